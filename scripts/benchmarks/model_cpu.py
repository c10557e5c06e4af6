"""Time whole models on the CPU: a packed classifier and a packed language model beside stock Transformers and others.

    python scripts/benchmark_model_cpu.py classification --model teacher/ --data movie_reviews/ --threads 2
    python scripts/benchmark_model_cpu.py generation --model smollm2/ --threads 2

`classification` runs batches of 1 and 32 texts of 32 and 128 tokens; with `--data`, a folder whose test.csv has the
column `text`, it also counts how many predictions agree with the float32 model's. ONNX Runtime runs the exported model
with dynamic 8-bit quantization, in a process of its own, in turn (pip install onnx onnxruntime). `--peers` adds what
`cpu_peers.py` finds installed. `generation` runs
greedy decoding of 128 tokens after a prompt of 128, one text at a time; `compiled` is `torch.compile` over a static
cache, and its compilation is not counted. With one thread the clock is the processor time of the calling thread, with
more it is the wall clock. Reported: the median time, and the ratio to the float32 model with the range of the passes.
"""

import argparse
import copy
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from benchmark_cpu import in_turn  # noqa: E402
from cpu_peers import classifiers, decoders, installed  # noqa: E402

import hf_compress as hfc  # noqa: E402
from hf_compress.measuring.timing import time_interleaved  # noqa: E402

Classifier = Callable[[Tensor, Tensor], Tensor]  # input_ids, attention_mask (B, T) -> logits (B, C)
ROWS = dict(group_size=-1, symmetric=True)  # one scale a row


def torch_classifiers(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Classifier]:
    eight = hfc.quantize(copy.deepcopy(model), 8, embedding_bits=8)
    models = {
        "float32": model,
        "bfloat16": copy.deepcopy(model).bfloat16(),
        "hf_compress 8 bit": eight,
        "hf_compress 8 bit, one scale a row": hfc.quantize(copy.deepcopy(model), 8, embedding_bits=8, **ROWS),
        "hf_compress 8 bit, bfloat16": copy.deepcopy(eight).bfloat16(),
        "hf_compress 4 bit, bfloat16": hfc.quantize(copy.deepcopy(model), 4, embedding_bits=8).bfloat16(),
        "hf_compress 8 bit, int8 activations, bfloat16": hfc.quantize(
            copy.deepcopy(model), 8, embedding_bits=8, activation_bits=8, **ROWS
        ).bfloat16(),
    }
    if args.compressed is not None:
        models[f"{args.compressed}, bfloat16"] = load(args.compressed, dtype=torch.bfloat16)
    if args.peers:
        models |= installed(classifiers, load, args.model)
    return {name: partial(logits_of, one) for name, one in models.items()}


def load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def logits_of(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask).logits.float()


class Exported(torch.nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def onnxruntime_classifiers(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Classifier]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    ids = torch.ones(2, 16, dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    model.set_attn_implementation("eager")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        plain, small = f"{folder}/model.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(Exported(model), (ids, ids), plain, dynamo=False, input_names=names, output_names=["logits"],
                          dynamic_axes={name: {0: "batch", 1: "length"} for name in names})  # fmt: skip
        quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
        session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        feed = dict(zip(names, (input_ids.numpy(), attention_mask.numpy()), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])

    return {"onnxruntime int8": run}


CLASSIFIERS = {"torch": torch_classifiers, "onnxruntime": onnxruntime_classifiers}


def classification(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    model = load(args.model, dtype=torch.float32)
    stock = copy.deepcopy(model)
    calls = CLASSIFIERS[args.family](model, args)
    vocabulary = min(len(load(folder, dtype=torch.float32).get_input_embeddings().weight) for folder in folders(args))
    results = {}
    for batch in args.batches:
        for length in args.lengths:
            ids = torch.randint(5, vocabulary, (batch, length))
            seconds = timed([partial(call, ids, torch.ones_like(ids)) for call in calls.values()], args)
            results[f"batch {batch} length {length}"] = dict(zip(calls, seconds, strict=True))
    if args.data:
        results["agreement"] = agreement(stock, calls, args)
    return results


def folders(args: argparse.Namespace) -> list[Path]:
    return [args.model] if args.compressed is None else [args.model, args.compressed]


def agreement(stock: PreTrainedModel, calls: dict[str, Classifier], args: argparse.Namespace) -> dict:
    """Share of texts for which a model predicts what the float32 one does."""
    with (args.data / "test.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)][: args.texts]
    tokenizers = {folder: AutoTokenizer.from_pretrained(folder) for folder in folders(args)}
    options = dict(padding=True, truncation=True, max_length=128, return_tensors="pt")
    same = dict.fromkeys(calls, 0)
    for start in range(0, len(texts), 32):
        some = texts[start : start + 32]  # a pruned vocabulary numbers them in its own way
        batches = {folder: tokenizer(some, **options) for folder, tokenizer in tokenizers.items()}
        expected = logits_of(stock, *inputs_of(batches[args.model])).argmax(-1)
        for name, call in calls.items():
            batch = batches[args.compressed if name.startswith(f"{args.compressed},") else args.model]
            same[name] += int((call(*inputs_of(batch)).argmax(-1) == expected).sum())
    return {name: [count / len(texts)] for name, count in same.items()}


def inputs_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def generation(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    four = hfc.quantize(copy.deepcopy(model), 4, embedding_bits=8)
    half = copy.deepcopy(four).bfloat16()
    runs = {
        "float32": (model, {}),
        "bfloat16": (copy.deepcopy(model).bfloat16(), {}),
        "hf_compress 4 bit": (four, {}),
        "hf_compress 4 bit, bfloat16": (half, {}),
    }
    if args.compiled:
        runs["hf_compress 4 bit, bfloat16, compiled"] = (copy.deepcopy(half), hfc.compiled_decoding())
    if args.peers:
        peers = installed(decoders, AutoModelForCausalLM.from_pretrained, args.model)
        runs |= {name: (one, {}) for name, one in peers.items()}
    prompt = torch.randint(5, model.config.vocab_size, (1, args.prompt))
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=args.new_tokens,
                   min_new_tokens=args.new_tokens)  # fmt: skip
    calls = [partial(one.generate, prompt, **options, **more) for one, more in runs.values()]
    return {generation_cell(args): dict(zip(runs, timed(calls, args), strict=True))}


def llama_cpp(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """llama.cpp on the file given by `--gguf`: the same lengths, greedy."""
    from llama_cpp import Llama

    model = Llama(str(args.gguf), n_ctx=args.prompt + args.new_tokens, n_threads=args.threads, verbose=False,
                  n_threads_batch=args.threads)  # fmt: skip
    prompt = torch.randint(5, model.n_vocab(), (args.prompt,)).tolist()

    def generate() -> None:
        model.reset()
        tokens = model.generate(prompt, top_k=1, temp=0.0)
        for _ in range(args.new_tokens):
            next(tokens)

    # it has threads of its own, whose time is not the caller's
    seconds = time_interleaved([generate], rounds=args.rounds, warmup_rounds=1)
    return {generation_cell(args): {f"llama.cpp {args.gguf.name}": seconds[0]}}


def generation_cell(args: argparse.Namespace) -> str:
    return f"prompt of {args.prompt}, {args.new_tokens} new tokens"


GENERATORS = {"torch": generation, "llama.cpp": llama_cpp}


def timed(calls: list[Callable[[], object]], args: argparse.Namespace) -> list[list[float]]:
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    return time_interleaved(calls, rounds=args.rounds, warmup_rounds=1, clock=clock)


def report(passes: list[dict[str, dict[str, list[float]]]]) -> None:
    for cell, names in passes[0].items():
        for name in names:
            if cell == "agreement":
                print(f"predictions that agree with float32: {name} {passes[0][cell][name][0]:.2%}")
                continue
            each = [statistics.median(p[cell][name]) for p in passes]
            ratios = [statistics.median(p[cell]["float32"]) / time for p, time in zip(passes, each, strict=True)]
            print(f"{cell}: {name} {1e3 * statistics.median(each):.1f} ms, {statistics.median(ratios):.2f} x float32 "
                  f"({min(ratios):.2f}-{max(ratios):.2f})")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("classification", "generation"))
    parser.add_argument("--model", type=Path, required=True, help="Folder of an unquantized checkpoint.")
    parser.add_argument("--compressed", type=Path, help="A compressed classifier, timed beside the others.")
    parser.add_argument("--data", type=Path, help="Folder with test.csv, to compare predictions.")
    parser.add_argument("--texts", type=int, default=2500)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--compiled", action="store_true", help="Also the compiled decoding step; takes a minute more.")
    parser.add_argument("--peers", action="store_true", help="Also other libraries, as far as they are installed.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--families", nargs="+", choices=CLASSIFIERS, default=list(CLASSIFIERS))
    parser.add_argument("--gguf", type=Path, help="The language model for llama.cpp (pip install llama-cpp-python).")
    parser.add_argument("--family", choices=[*CLASSIFIERS, *GENERATORS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.family:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        with torch.inference_mode():
            print(json.dumps((classification if args.what == "classification" else GENERATORS[args.family])(args)))
        return
    families = args.families if args.what == "classification" else list(GENERATORS)[: 1 + (args.gguf is not None)]
    report(in_turn(families, passes=args.passes, threads=args.threads))


if __name__ == "__main__":
    main()
