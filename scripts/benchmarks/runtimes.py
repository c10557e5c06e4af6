"""A trained classifier in each runtime, whole and halved: agreement with itself in PyTorch, accuracy, size and time.

    python scripts/benchmarks/runtimes_models.py --data movie_reviews/ --output runs/runtimes
    python scripts/benchmarks/runtimes.py --models runs/runtimes --texts movie_reviews/test.csv --threads 1

    ranges     8-bit rows, inputs rounded on trained ranges: the models full-8-bit and half-8-bit
    per token  8-bit rows of full and half, each token rounded as it comes
    4 bit      groups of 64 or 128 columns of full and half, tables in 4 bit as well; not timed
    NNCF       what NNCF makes of full and half after training, where it is installed (`pip install nncf`)

"OpenVINO" is run as the README of its folder has it; "integers" with products of integers, which are exact with VNNI
alone. In turns; a turn is a call that does not count, and the mean of as many as take 20 ms. Medians and 10th to 90th
percentiles, of processor time on one thread, of time on several. What was exported is kept beside the models, and so
are results.
"""

import csv
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, PreTrainedModel

import hf_compress as hfc
from hf_compress.formats.runtimes.agreement import Session, feed
from hf_compress.formats.runtimes.opened import runner
from hf_compress.measuring.stored import stored_size
from hf_compress.measuring.timing import Spread, time_interleaved
from hf_compress.report.compare import median_ratio

SHAPES = (1, 32), (32, 32)
RUNTIMES = {"OpenVINO": "openvino", "ONNX Runtime": "onnx"}
AT_ONCE = {
    "per token": dict(bits=8, group_size=-1, symmetric=True, embedding_bits=8),
    "4 bit": dict(bits=4, group_size="auto", symmetric=True, embedding_bits=4),
}
Run = Callable[[dict[str, Tensor]], np.ndarray]  # a batch -> logits (B, C)


@dataclass
class Arguments:
    models: str = field(metadata={"help": "Folder that runtimes_models.py wrote."})
    texts: str = field(metadata={"help": "CSV file with the columns text and label."})
    structures: list[str] = field(default_factory=lambda: ["full", "half"], metadata={"help": "Of the models."})
    kinds: list[str] = field(default_factory=lambda: ["ranges", *AT_ONCE], metadata={"help": "Of packed models."})
    threads: int = field(default=1, metadata={"help": "Of PyTorch and of each runtime."})
    rounds: int = field(default=15, metadata={"help": "How often each is timed; 0 for not at all."})
    limit: int = field(default=1500, metadata={"help": "Texts for agreement and accuracy; 0 for none."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    models = Path(args.models)
    with Path(args.texts).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts, labels = [row["text"] for row in rows], np.array([int(row["label"]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(models / "full")
    stock = torch_run(AutoModelForSequenceClassification.from_pretrained(models / "full"))
    runs, sizes = {"stock float32": stock}, {}
    for structure in args.structures:
        ours, bytes_ = contestants(models, structure, args, texts)
        runs, sizes = runs | ours, sizes | bytes_
    results = {"bytes": sizes, "agreement": {}, "ms": {}}
    if args.limit:
        results["agreement"] = agreement(runs, batches(tokenizer, texts[: args.limit]), labels[: args.limit])
    timed = {name: run for name, run in runs.items() if "4 bit" not in name}
    for shape in SHAPES if args.rounds else ():
        results["ms"][f"{shape[0]} x {shape[1]}"] = times(timed, shape, args, tokenizer)
    kept = models / f"results-{args.threads}-{time.strftime('%H%M%S')}.json"
    kept.write_text(json.dumps(results, indent=1), encoding="utf-8")


def contestants(
    models: Path, structure: str, args: Arguments, texts: list[str]
) -> tuple[dict[str, Run], dict[str, int]]:
    """What runs, and bytes of what is stored, by names such as "half, ranges, OpenVINO"."""
    plain, tokenizer = opened(models / structure), AutoTokenizer.from_pretrained(models / structure)
    runs, sizes = {f"{structure}, float32": torch_run(plain)}, {}
    for kind in args.kinds:
        model = opened(models / (f"{structure}-8-bit" if kind == "ranges" else structure))
        model = hfc.quantize(model, **AT_ONCE[kind]) if kind in AT_ONCE else model
        name = f"{structure}, {kind}"
        runs[f"{name}, packed"], sizes[f"{name}, packed"] = torch_run(model), stored_size(model)[0]
        for runtime, format in RUNTIMES.items():
            folder = models / "exports" / f"{name.replace(', ', '-').replace(' ', '-')}-{format}"
            if not folder.exists():
                hfc.export(model, folder, format=format, tokenizer=tokenizer, calibration=texts[:64])
            open_folder = partial(runner(folder).open_folder, folder, threads=args.threads)
            runs[f"{name}, {runtime}"] = session_run(open_folder())
            sizes[f"{name}, {runtime}"] = sum(path.stat().st_size for path in folder.iterdir() if "model." in path.name)
            if format == "openvino" and kind != "4 bit":
                runs[f"{name}, {runtime}, integers"] = session_run(open_folder(exact=False))
    if find_spec("nncf"):
        runs |= post_training(plain, tokenizer, texts, models / "exports" / f"{structure}-nncf", args.threads)
    return runs, sizes


def post_training(model, tokenizer, texts: list[str], folder: Path, threads: int) -> dict[str, Run]:
    """NNCF's own 8-bit model of the same structure, calibrated on 300 texts, run in both ways."""
    structure = folder.name.removesuffix("-nncf")
    from hf_compress.formats.runtimes.openvino_session import core, open_folder

    if not folder.exists():
        import nncf
        import openvino as ov

        hfc.export(model, folder.with_name(f"{structure}-float-openvino"), format="openvino", tokenizer=tokenizer)
        plain = core().read_model(folder.with_name(f"{structure}-float-openvino") / "openvino_model.xml")
        names = [port.get_any_name() for port in plain.inputs]
        rows = [tokenizer(text, truncation=True, max_length=64, return_tensors="np") for text in texts[:300]]
        data = nncf.Dataset([{name: row[name] for name in names} for row in rows])
        ov.save_model(nncf.quantize(plain, data, model_type=nncf.ModelType.TRANSFORMER), folder / "openvino_model.xml",
                      compress_to_fp16=False)  # fmt: skip
        shutil.rmtree(folder.with_name(f"{structure}-float-openvino"))
    return {
        f"{structure}, NNCF": session_run(open_folder(folder, threads=threads)),
        f"{structure}, NNCF, integers": session_run(open_folder(folder, threads=threads, exact=False)),
    }


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def torch_run(model: PreTrainedModel) -> Run:
    return torch.inference_mode()(lambda batch: model(**batch).logits.numpy())


def session_run(session: Session) -> Run:
    return lambda batch: session.run(feed(session, batch))["logits"]


def batches(tokenizer, texts: list[str]) -> list[dict[str, Tensor]]:
    return [
        dict(tokenizer(texts[i : i + 50], padding=True, truncation=True, max_length=64, return_tensors="pt"))
        for i in range(0, len(texts), 50)
    ]


def agreement(runs: dict[str, Run], texts: list, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Of each run beside the packed model that it came from (the float model where there is none), and its accuracy."""
    logits = {name: np.concatenate([run(batch) for batch in texts]) for name, run in runs.items()}
    told = {}
    for name, found in logits.items():
        structure, *kind = name.split(", ")
        packed = f"{structure}, {kind[0]}, packed" if kind else ""
        expected = logits[packed if packed in logits else f"{structure}, float32" if kind else name]
        told[name] = {
            "same_class": float((expected.argmax(1) == found.argmax(1)).mean()),
            "largest_difference": float(np.abs(expected - found).max()),
            "accuracy": float((found.argmax(1) == labels).mean()),
        }
        print(name, "  ".join(f"{key} {value:.4f}" for key, value in told[name].items()), flush=True)
    return told


def times(runs: dict[str, Run], shape: tuple[int, int], args: Arguments, tokenizer) -> dict[str, dict]:
    """Milliseconds, and how many times as fast as stock float32."""
    ids = torch.randint(1000, 2000, shape, generator=torch.Generator().manual_seed(0)).clamp(max=len(tokenizer) - 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    calls = [partial(run, batch) for run in runs.values()]
    seconds = time_interleaved(calls, rounds=args.rounds, steady=True, clock=clock)
    spreads = {name: Spread.of([1e3 * t for t in taken]) for name, taken in zip(runs, seconds, strict=True)}
    print(f"{shape[0]} x {shape[1]}, {args.threads} threads")
    told = {}
    for name, ms in spreads.items():
        faster = median_ratio(spreads["stock float32"], ms)
        told[name] = {"faster": faster.value, "samples": ms.samples}
        print(f"    {name:34} {ms.median:8.2f} ms ({ms.low:.2f} to {ms.high:.2f}), {faster.value:.2f}x", flush=True)
    return told


if __name__ == "__main__":
    main()
