"""GGUF files in llama.cpp: how well it tells the next token of a text, beside PyTorch, and how fast it writes.

    pip install xllamacpp
    python scripts/checks/llama.py                                   # a random Llama of two layers
    python scripts/checks/llama.py --model smollm2 --text README.md --tokens 128

One thread. Weights are float32, 8 and 4 bit in symmetric groups of 32. Perplexity is over the tokens whose place has a
printable most likely token: for others llama.cpp's server gives no distribution.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import hf_compress as hfc

BITS = None, 8, 4
PROMPT, WRITTEN = 8, 32  # tokens


@dataclass
class Arguments:
    model: str | None = field(default=None, metadata={"help": "Folder of a language model; a random one by default."})
    text: str | None = field(default=None, metadata={"help": "File whose beginning is told; random tokens by default."})
    tokens: int = field(default=48, metadata={"help": "Of the text."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    for bits in BITS:
        model, tokenizer = opened(args.model)
        model = model if bits is None else hfc.quantize(model, bits=bits, symmetric=True, group_size=32)
        ids = torch.randint(5, len(tokenizer), (args.tokens,), generator=torch.Generator().manual_seed(0))
        if args.text:
            ids = tokenizer(Path(args.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[
                0, : args.tokens
            ]
        with tempfile.TemporaryDirectory() as temporary:
            folder = hfc.export(model, Path(temporary) / "model", format="gguf", tokenizer=tokenizer)
            tensors = json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))["tensors"]
            report(bits, tensors, model, server(folder / "model.gguf"), ids)


def report(bits: int | None, tensors: dict, model: PreTrainedModel, llama: xllamacpp.Server, ids: Tensor) -> None:
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    pairs = [(logits[i, ids[i + 1]].item(), log_probability(llama, ids[: i + 1].tolist(), int(ids[i + 1]), model))
             for i in range(len(ids) - 1)]  # fmt: skip
    pairs = [pair for pair in pairs if pair[1] is not None]
    ours, theirs = (math.exp(-sum(column) / len(pairs)) for column in zip(*pairs, strict=True))
    largest = max(abs(a - b) for a, b in pairs)
    print(f"{bits or 'float'}  {tensors}  perplexity {ours:.4g}, llama.cpp {theirs:.4g} ({theirs / ours:.4f}), largest "
          f"difference of a log-probability {largest:.3f}, {len(pairs)} of {len(ids) - 1} tokens")  # fmt: skip
    prompt, options = ids[:PROMPT], {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    speeds = [WRITTEN / seconds(lambda: model.generate(prompt[None], **options)),
              WRITTEN / seconds(lambda: complete(llama, prompt.tolist(), WRITTEN, 0))]  # fmt: skip
    print(f"    tokens a second of processor time: {speeds[0]:.1f}, llama.cpp {speeds[1]:.1f} "
          f"({speeds[1] / speeds[0]:.1f}x)", flush=True)  # fmt: skip


def seconds(call) -> float:
    """Of processor time, the best of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def log_probability(llama: xllamacpp.Server, before: list[int], token: int, model: PreTrainedModel) -> float | None:
    """Of `token` behind others; None where the server tells none."""
    told = complete(llama, before, 1, model.config.vocab_size)["choices"][0]["logprobs"]
    if told is None:
        return None
    return next((one["logprob"] for one in told["content"][0]["top_logprobs"] if one["id"] == token), None)


def complete(llama: xllamacpp.Server, ids: list[int], tokens: int, told: int) -> dict:
    request = {"prompt": ids, "n_predict": tokens, "n_probs": told, "temperature": 0.0, "ignore_eos": True}
    return llama.handle_completions({**request, "cache_prompt": False, "post_sampling_probs": False})


def server(file: Path) -> xllamacpp.Server:
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(file), 512, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.verbosity = -1
    return xllamacpp.Server(options)


def opened(folder: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters, *(f"{a}{b}" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]
    merges = [(a, b) for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(words), max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), fast


if __name__ == "__main__":
    main()
