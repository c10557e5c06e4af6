"""Distil, prune and quantize a tiny model in one long run, and see that memory, open files and hooks do not grow.

    python scripts/checks/soak.py --steps 10000

A classifier learns from a teacher (TinyBERT's losses) while its heads are pruned and its weights are rounded to 4 bits;
it saves, evaluates and rotates checkpoints all the while. Measured at a tenth of the steps, when every cache has been
filled, and at the end: resident memory, open file handles, hooks on the modules, Python objects, tensors. Fails if one
of them has grown by more than its allowance.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

import hf_compress as hfc
from hf_compress.distillation.students import make_student

ALLOWED = {"resident_mib": 24, "file_handles": 0, "hooks": 0, "tensors": 8}  # growth from the first to the last look


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def look(model: torch.nn.Module) -> dict[str, float]:
    gc.collect()
    hooks = sum(
        len(found)
        for module in model.modules()
        for kind, found in vars(module).items()
        if kind.endswith("_hooks") and found is not None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked what they are
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    handles = len([*Path("/proc/self/fd").iterdir()])
    return {"resident_mib": round(resident_mib(), 1), "file_handles": handles, "hooks": hooks, "tensors": tensors}


class Looks(TrainerCallback):
    """Looks at a tenth of the steps, halfway and at the end: `looks` is step -> what was seen."""

    def __init__(self, steps: int):
        self.at = (max(1, steps // 10), steps // 2, steps)
        self.looks: dict[int, dict[str, float]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.at:
            self.looks[state.global_step] = look(model)


def rows(number: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (number, 12), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


def soak(steps: int, folder: Path) -> dict[int, dict[str, float]]:
    """What was seen at a tenth of the steps, halfway and at the end."""
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=64,
            max_position_embeddings=32,
        )  # fmt: skip
    )
    student = hfc.prepare_qat(make_student(teacher, num_hidden_layers=2), 4)
    every = max(1, steps // 20)
    args = hfc.TinyBertConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=every, save_steps=every, save_total_limit=2, eval_strategy="steps", eval_steps=every,
        intermediate_share=0.5,
    )  # fmt: skip
    looks = Looks(steps)
    callbacks = [hfc.QuantizationAware(refresh_steps=every), hfc.HeadPruning(0.4, begin=0.0, end=0.9), looks]
    data = rows(64)
    trainer = hfc.TinyBertTrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data,
                                  callbacks=callbacks)  # fmt: skip
    trainer.train()
    return looks.looks


def growth(looks: dict[int, dict[str, float]]) -> dict[str, float]:
    first, last = looks[min(looks)], looks[max(looks)]
    return {name: round(last[name] - first[name], 1) for name in first}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    run = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        looks = soak(run.steps, Path(folder))
    for step, seen in looks.items():
        print(step, json.dumps(seen))
    grown = growth(looks)
    print("grown", json.dumps(grown), f"in {run.steps} steps, {time.time() - start:.0f} s")
    if too_much := {name: value for name, value in grown.items() if value > ALLOWED[name]}:
        sys.exit(f"grown beyond {ALLOWED}: {too_much}")


if __name__ == "__main__":
    main()
