"""Tokens a second of a language model that generates on a GPU: 16 bit beside packed, step by step and in CUDA graphs.

    python scripts/benchmarks/generation.py --bits 4 3 8 --rounds 5            # SmolLM2-135M's shape, random weights
    python scripts/benchmarks/generation.py --model FOLDER --group_size 32     # a checkpoint of one's own
    python scripts/benchmarks/generation.py --model tiny --device cpu --rounds 1 --new_tokens 4

Every model writes as many tokens after the same prompt, in turns; a call that does not count compiles first. Before
it is timed, what a packed model answers to the prompt is held against the product with its dequantized weights, and
what it writes in graphs against what it writes without.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_compress as hfc
from hf_compress.measuring.measure import device_name, synchronize, versions
from hf_compress.measuring.timing import time_interleaved
from hf_compress.model.precision import DTYPES

SHAPES = {  # of random weights
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "qwen": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True),
}  # fmt: skip
BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 8e-2, torch.float32: 1e-3}  # of logits, over their norm


def opened(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    if args.model in SHAPES:
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.model]))
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    return model.to(DTYPES[args.dtype]).eval()


def check(name: str, model: PreTrainedModel, prompt: torch.Tensor) -> None:
    """Raise SystemExit where the kernels' logits are not those of the dequantized weights."""
    plain = copy.deepcopy(model).dequantize()
    with torch.inference_mode():
        found, expected = (one(input_ids=prompt).logits.float() for one in (model, plain))
    error = float((found - expected).norm() / expected.norm())
    if not error <= BOUNDS[model.dtype]:
        raise SystemExit(f"{name}: logits are {error:.3g} off, at most {BOUNDS[model.dtype]} are expected.")


def graphs(device: torch.device) -> dict:
    """Options of `generate` by which a decoding step is one graph; on a GPU Transformers compiles it by itself."""
    return {"cache_implementation": "static"} if device.type == "cuda" else hfc.compiled_decoding()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"A folder, or the shape of {', '.join(SHAPES)}.")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 8])
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="A file for the figures, JSON.")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{device_name(device)}, {versions()}", flush=True)
    dense = opened(args)
    models = {args.dtype: copy.deepcopy(dense).to(device)}
    prompt = torch.randint(5, dense.config.vocab_size, (1, args.prompt), device=device)
    for bits in args.bits:
        packed = hfc.quantize(copy.deepcopy(dense), bits, group_size=args.group_size).to(device)
        check(f"{bits} bit", packed, prompt)
        models[f"{bits} bit"] = packed
    write = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=args.new_tokens,
                 min_new_tokens=args.new_tokens)  # fmt: skip
    calls = {}
    for name, model in models.items():
        for way, options in (("step by step", {}), ("graphs", graphs(device))):
            calls[f"{name}, {way}"] = lambda model=model, options=options: model.generate(prompt, **write, **options)
    texts = {name: call()[0, args.prompt :] for name, call in calls.items()}  # compiles, too
    done = [lambda call=call: (call(), synchronize(device)) for call in calls.values()]
    times = time_interleaved(done, rounds=args.rounds, warmup_rounds=0)
    seconds = dict(zip(calls, times, strict=True))
    lines = []
    for name, own in seconds.items():
        way = name.partition(", ")[2]
        ratios = sorted(a / b for a, b in zip(seconds[f"{args.dtype}, {way}"], own, strict=True))
        same = float((texts[name] == texts[f"{name.partition(', ')[0]}, step by step"]).float().mean())
        rate = args.new_tokens / statistics.median(own)
        lines.append({"model": name, "tokens_per_second": rate, "times_dense": statistics.median(ratios),
                      "range": [ratios[0], ratios[-1]], "same_tokens": same})  # fmt: skip
        print(f"{name:24} {rate:8.1f} tokens/s  {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
              f"times {args.dtype}, {same:.0%} of the tokens as step by step", flush=True)  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
