"""A packed classifier in each runtime: agreement with itself in PyTorch, accuracy, size, and time beside stock float32.

    python scripts/benchmarks/runtimes.py --float_model full --packed half-qat --texts test.csv --structure half

In turns; medians and 10th to 90th percentiles, of processor time on one thread, of time on several.
With `structure`, beside what NNCF makes of the same structure after training (`pip install nncf`).
"""

import csv
import json
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

import hf_compress as hfc
from hf_compress.formats.runtimes.agreement import Session, feed
from hf_compress.formats.runtimes.opened import runner
from hf_compress.measuring.stored import stored_size
from hf_compress.measuring.timing import Spread, time_interleaved
from hf_compress.report.compare import median_ratio

SHAPES = (1, 32), (1, 128), (32, 32)


@dataclass
class Arguments:
    float_model: str = field(metadata={"help": "Folder of the float32 model that times are compared with."})
    packed: str = field(metadata={"help": "Folder of the packed model."})
    texts: str = field(metadata={"help": "CSV file with the columns text and label."})
    formats: list[str] = field(default_factory=lambda: ["openvino", "onnx"], metadata={"help": "Runtimes."})
    structure: str | None = field(default=None, metadata={"help": "Folder of the float model that was packed."})
    threads: int = field(default=1, metadata={"help": "Of PyTorch and of each runtime."})
    rounds: int = field(default=15, metadata={"help": "How often each is timed."})
    limit: int = field(default=1500, metadata={"help": "Texts for agreement and accuracy."})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    stock = AutoModelForSequenceClassification.from_pretrained(args.float_model).eval()
    packed = AutoModelForSequenceClassification.from_pretrained(args.packed).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.packed)
    with Path(args.texts).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[: args.limit]
    texts = [row["text"] for row in rows]
    batches = [tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt")
               for i in range(0, len(texts), 32)]  # fmt: skip
    labels = np.array([int(row["label"]) for row in rows])
    expected = logits_of(lambda batch: packed(**batch).logits.numpy(), batches)
    sizes, sessions = {"packed": stored_size(packed)[0]}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.formats:
            folder = hfc.export(
                packed, Path(temporary) / name, format=name, tokenizer=tokenizer, calibration=texts[:64]
            )
            runtime = runner(folder)
            sizes[name] = sum(path.stat().st_size for path in folder.iterdir() if "model." in path.name)
            sessions[name] = runtime.open_folder(folder, threads=args.threads)
            if name == "openvino":
                sessions["openvino, integers"] = runtime.open_folder(folder, threads=args.threads, exact=False)
            print(name, json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))["agreement"])
        if args.structure:
            sessions |= post_training(args, texts, Path(temporary) / "structure")
        for name, session in sessions.items():
            found = logits_of(lambda batch, session=session: session.run(feed(session, batch))["logits"], batches)
            report(name, expected, found, labels)
        report("float32", expected, logits_of(lambda batch: stock(**batch).logits.numpy(), batches), labels)
        print("bytes", {name: f"{size / sizes['packed']:.3f} of the packed" for name, size in sizes.items()})
        time_all({"float32": stock, "packed": packed}, sessions, args)


def post_training(args: Arguments, texts: list[str], folder: Path) -> dict[str, Session]:
    """NNCF's own 8-bit model of the same structure, calibrated on 300 texts, run in both ways."""
    import nncf
    import openvino as ov

    from hf_compress.formats.runtimes.openvino_session import RUN_OPTIONS, WITHOUT_OVERFLOW, session

    model, tokenizer = (
        kind.from_pretrained(args.structure) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    hfc.export(model, folder, format="openvino", tokenizer=tokenizer)
    plain, limit = ov.Core().read_model(folder / "openvino_model.xml"), {"INFERENCE_NUM_THREADS": args.threads}
    names = [port.get_any_name() for port in plain.inputs]
    rows = [tokenizer(text, truncation=True, max_length=128, return_tensors="np") for text in texts[:300]]
    data = nncf.Dataset([{name: row[name] for name in names} for row in rows])
    quantized = nncf.quantize(plain, data, model_type=nncf.ModelType.TRANSFORMER)
    return {
        "nncf": session(quantized, WITHOUT_OVERFLOW | limit),
        "nncf, integers": session(quantized, RUN_OPTIONS | limit),
    }


@torch.no_grad()
def logits_of(run, batches: list) -> np.ndarray:
    return np.concatenate([run(batch) for batch in batches])


def report(name: str, expected: np.ndarray, found: np.ndarray, labels: np.ndarray) -> None:
    same, right = (expected.argmax(1) == found.argmax(1)).mean(), (found.argmax(1) == labels).mean()
    difference = np.abs(expected - found).max()
    print(f"{name:18} same class {same:.2%}  largest difference {difference:.3g}  accuracy {right:.2%}")


@torch.no_grad()
def time_all(models: dict, sessions: dict[str, Session], args: Arguments) -> None:
    """Milliseconds, and how many times as fast as float32."""
    longest = next(iter(models.values())).config.max_position_embeddings
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for rows, tokens in (shape for shape in SHAPES if shape[1] <= longest):
        ids = torch.randint(1000, 2000, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids.clamp(max=next(iter(models.values())).config.vocab_size - 1)}
        batch["attention_mask"] = torch.ones_like(ids)
        calls = {name: partial(model, **batch) for name, model in models.items()}
        calls |= {name: partial(session.run, feed(session, batch)) for name, session in sessions.items()}
        seconds = time_interleaved(list(calls.values()), rounds=args.rounds, clock=clock)
        spreads = {name: Spread.of([1e3 * t for t in times]) for name, times in zip(calls, seconds, strict=True)}
        print(f"{rows} x {tokens}")
        for name, ms in spreads.items():
            faster = median_ratio(spreads["float32"], ms)
            print(f"    {name:18} {ms.median:.2f} ms ({ms.low:.2f} to {ms.high:.2f}), {faster.value:.2f}x")


if __name__ == "__main__":
    main()
