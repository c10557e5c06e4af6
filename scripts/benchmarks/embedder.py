"""How much of an embedder's neighbourhood smaller ones keep: students of 6 and 3 layers, distilled from text alone.

    python scripts/benchmarks/embedder.py --model all-mpnet-base-v2/ --texts bbc-news --output runs/embedders
    python scripts/benchmarks/embedder.py --model all-mpnet-base-v2/ --texts lines.txt --layers 3 --max_steps 200

`--texts` are `bbc-news`, or files with a text a line; long texts are cut into pieces of a few sentences, and a tenth of
the first ones, no piece of which is learned from, is held out. Of the held-out pieces it says: Spearman's correlation
of all cosines with the teacher's, recall of the teacher's ten nearest, and the time of one text of `--tokens` and of 32
of them in turns: in PyTorch, and in 8 bit as exported to `--runtime`. What is saved opens in SentenceTransformer. A
run that was stopped goes on.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_compress as hfc  # noqa: E402
from hf_compress.formats.export import export  # noqa: E402
from hf_compress.measuring.measure import device_name, load_model, versions  # noqa: E402
from hf_compress.measuring.metrics import spearman  # noqa: E402
from hf_compress.model.precision import has_fast_bfloat16  # noqa: E402
from hf_compress.model.reading import PaddingCollator  # noqa: E402
from hf_compress.recipe.texts import open_splits  # noqa: E402
from hf_compress.report.vectors import agreement, text_vectors  # noqa: E402
from hf_compress.shrinking.times import packed  # noqa: E402

SENTENCES = 3  # of a piece
HELD_OUT = 10  # each so manieth text
MOST_HELD_OUT = 1000


def pieces(text: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [" ".join(sentences[i : i + SENTENCES]) for i in range(0, len(sentences), SENTENCES)]


def read(sources: list[str]) -> tuple[list[str], list[str]]:
    """Pieces to learn from, and held-out ones of the first source."""
    split: tuple[list[str], list[str]] = ([], [])
    for source in sources:
        for number, text in enumerate(open_splits(source)[0]["train"]["text"]):
            is_held_out = source == sources[0] and number % HELD_OUT == 0
            split[is_held_out].extend(piece for piece in pieces(text) if len(piece) > 20)
    return split[0], split[1][:MOST_HELD_OUT]


def tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    rows = tokenizer(texts, truncation=True, max_length=tokens)
    return Dataset.from_dict({name: rows[name] for name in ("input_ids", "attention_mask")})


def all_cosines(vectors: Tensor) -> Tensor:
    above = torch.triu(torch.ones(len(vectors), len(vectors), dtype=torch.bool), diagonal=1)
    return (vectors @ vectors.mT)[above]


def distil(args: argparse.Namespace, layers: int, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A student, or the one that an earlier run left."""
    folder = Path(args.output) / f"{layers}-layers"
    if (folder / "model.safetensors").is_file():
        return folder
    teacher = AutoModel.from_pretrained(args.model)
    terms = [hfc.Hints(hints=args.hints, hint_weight=args.hint_weight)] if args.hints else []
    config = hfc.EmbeddingDistillationConfig(
        str(folder / "trainer"), num_train_epochs=args.epochs, max_steps=args.max_steps, queue_size=args.queue,
        learning_rate=args.learning_rate, per_device_train_batch_size=args.batch_size, warmup_steps=0.1,
        bf16=has_fast_bfloat16(torch.device("cpu")),
        save_steps=0.1, save_total_limit=1, logging_steps=20, report_to="none", use_cpu=True,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = hfc.EmbeddingDistillationTrainer(
        hfc.make_student(teacher, num_hidden_layers=layers), config, teacher_model=args.model, train_dataset=rows,
        processing_class=tokenizer, terms=terms,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any((folder / "trainer").glob("checkpoint-*")) or None)
    trainer.save_model(str(folder))
    return folder


def served(folder: Path, runtime: str, checked: list[str]) -> Path:
    """The student of a folder in 8 bit, as exported; or what an earlier run left."""
    exported = folder.with_name(f"{folder.name}-{runtime}")
    if not exported.exists():
        export(packed(load_model(folder)), exported, format=runtime, calibration=checked)
    return exported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A folder of sentence-transformers, or any encoder.")
    parser.add_argument("--texts", nargs="+", default=["bbc-news"], help="bbc-news, or a file; the first is held out.")
    parser.add_argument("--output", required=True, help="Folder of the students.")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 3], help="Of the students.")
    parser.add_argument("--tokens", type=int, default=64, help="At most, of a text.")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--queue", type=int, default=256, help="Texts that similarities are compared with besides.")
    parser.add_argument("--hints", help="States of tokens to follow, too, as hfc.Hints takes them: skip, last:last.")
    parser.add_argument("--hint_weight", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20, help="Of the timing.")
    parser.add_argument("--runtime", choices=("openvino", "onnx"), help="What the students run in besides.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    learned, held_out = read(args.texts)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, test = (tokenized(texts, tokenizer, args.tokens) for texts in (learned, held_out))
    print(f"{len(rows)} pieces to learn from, {len(test)} held out; {device_name(torch.device('cpu'))}, {args.threads} "
          f"thread(s), {versions()}", flush=True)  # fmt: skip
    folders = {"teacher": args.model} | {f"{n} layers": str(distil(args, n, rows, tokenizer)) for n in args.layers}
    for name, folder in list(folders.items())[1:] if args.runtime else ():
        folders[f"{name}, 8 bit, {args.runtime}"] = str(served(Path(folder), args.runtime, held_out[:64]))
    vectors = {n: text_vectors(load_model(f), f, test, PaddingCollator(tokenizer)) for n, f in folders.items()}
    report = hfc.compare(
        folders, sequence_length=args.tokens, latency_rounds=args.rounds, throughput_rounds=args.rounds
    )
    found = {}
    for entry in report.entries:
        pair = [all_cosines(vectors[name]) for name in (entry.name, "teacher")]
        found[entry.name] = {
            "spearman": spearman(torch.stack(pair, -1)).item(),
            "recall@10": agreement(vectors[entry.name], vectors["teacher"])[:, 1].mean().item(),
            "latency_speed_up": entry.latency_speed_up.value, "throughput_speed_up": entry.throughput_speed_up.value,
            "megabytes": entry.measurement.stored_bytes / 1e6,
        }  # fmt: skip
        print(entry.name, "  ".join(f"{name} {value:.3f}" for name, value in found[entry.name].items()))
    Path(args.output, "figures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
