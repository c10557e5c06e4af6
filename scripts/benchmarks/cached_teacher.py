"""What an epoch from a cached teacher costs over training the student alone, on random data and weights.

    python scripts/benchmarks/cached_teacher.py --turns 5

Prints, for the student alone and for each kind of cache, the time of an epoch relative to the student alone, in turns:
the median, the least and the most. CPU time of the process, so that other work on the machine counts little.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_compress as hfc


@dataclass
class Arguments:
    turns: int = field(default=5, metadata={"help": "Epochs of each contestant, in turns."})
    examples: int = field(default=128, metadata={"help": "Examples of an epoch."})
    length: int = field(default=128, metadata={"help": "Tokens of an example."})
    batch_size: int = field(default=16, metadata={"help": "Examples of a step."})
    hidden_size: int = field(default=384, metadata={"help": "Width of student and teacher."})
    num_layers: int = field(default=3, metadata={"help": "Layers of the student; the teacher has twice as many."})


def random_rows(args: Arguments, *, masked: bool) -> Dataset:
    tokens = torch.randint(5, 30000, (args.examples, args.length)).tolist()
    labels = tokens if masked else [i % 2 for i in range(args.examples)]
    return Dataset.from_dict(
        {"input_ids": tokens, "attention_mask": [[1] * args.length] * len(tokens), "labels": labels}
    )


def model(args: Arguments, kind: type, layers: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "bert", hidden_size=args.hidden_size, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=4 * args.hidden_size,
    )  # fmt: skip
    return kind.from_config(config)


def contestants(args: Arguments, folder: Path, *, masked: bool) -> dict[str, Callable[[], object]]:
    """Name -> a function that trains a student for one epoch."""
    kind = AutoModelForMaskedLM if masked else AutoModelForSequenceClassification
    rows, teacher = random_rows(args, masked=masked), model(args, kind, 2 * args.num_layers)
    common = dict(num_train_epochs=1, per_device_train_batch_size=args.batch_size, report_to="none", disable_tqdm=True,
                  save_strategy="no", logging_strategy="no", optim="adamw_torch_fused")  # fmt: skip
    last = 2 * args.num_layers
    caches = {"top 64 logits": dict(top_k=64, dtype=torch.float16)} if masked else {
        "logits": {}, "logits and two hidden states": dict(hidden_states=(args.num_layers, last), dtype=torch.float16)
    }  # fmt: skip
    trainers = {
        "alone": Trainer(model(args, kind, args.num_layers), TrainingArguments(folder, **common), train_dataset=rows)
    }
    trainer, config = (
        (hfc.WordLevelTrainer, hfc.WordLevelConfig) if masked else (hfc.DistillationTrainer, hfc.DistillationConfig)
    )
    for name, options in caches.items():
        cached = hfc.cache_teacher(teacher, rows, folder / name, **options)
        trainers[name] = trainer(
            model(args, kind, args.num_layers), config(folder, **common), teacher_model=cached, train_dataset=rows
        )
    for one in trainers.values():
        one.remove_callback(PrinterCallback)
    return {name: one.train for name, one in trainers.items()}


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(0)
    for task, masked in (("classification", False), ("masked language model", True)):
        with tempfile.TemporaryDirectory() as folder:
            epochs = contestants(args, Path(folder), masked=masked)
            times = {name: [] for name in epochs}
            for turn in range(args.turns + 1):
                for name, epoch in epochs.items():
                    start = time.process_time()
                    epoch()
                    if turn:  # the first warms up
                        times[name].append(time.process_time() - start)
        print(f"{task}: an epoch of the student alone takes {statistics.median(times['alone']):.2f} s of CPU time")
        for name in [name for name in times if name != "alone"]:
            ratios = [mine / alone for mine, alone in zip(times[name], times["alone"], strict=True)]
            print(f"  {name}: {statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
