"""Every trainer of the project on a tiny model, built alike: what the tests of trust are parametrised over.

A new trainer is among them as soon as the package offers it; what it needs beside a pair of classifiers stands here.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from distillation.data import rows
from helpers import tiny_model
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedModel, Trainer, TrainerCallback
from trust.compositions import COMPOSITIONS, QUICK, Composition

import hf_compress as hfc
from hf_compress.distillation.students import make_student
from hf_compress.distillation.trainer import DistillationTrainer

TRAINERS = tuple(name for name in hfc.__all__ if name.endswith("Trainer"))
CAUSAL = ("ScaleTrainer", "WordLevelTrainer")
OPTIONS = {
    "BlockPruningTrainer": {**QUICK, "block_size": 8, "method": "movement"},
    "DistillationTrainer": {"hints": "1:2,2:4", "teacher_noise": 0.1},
    "HeadGatesTrainer": {"l0": 1.0},
    "HeadPruningTrainer": QUICK,
    "LayerPruningTrainer": {"share": 0.5},
    "MarginMSETrainer": {"max_length": 16},
    "NeuronPruningTrainer": QUICK,
    "QBertTrainer": {"refresh_steps": 2, "start_bits": 8},
    "RankGatesTrainer": {"multiplier_rate": 300.0},
    "TheseusTrainer": {"intermediate_share": 0.5},
    "TinyBertTrainer": {"intermediate_share": 0.5},
    "WeightPruningTrainer": {**QUICK, "method": "movement"},
}


def quiet(value: float | None) -> dict[str, float]:
    """Changes of a config that set all its dropout, for runs that are compared with others."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    return {} if value is None else dict.fromkeys(names, value)


def data_of(name: str, number: int = 24, seed: int = 0):
    if name == "MarginMSETrainer":
        words = torch.randint(0, 50, (number, 4), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = [[f"word{n}" for n in row] for row in words]
        return Dataset.from_list(
            [{"query": a, "positive": f"{a} {b}", "negative": [c, f"{c} {d}"]} for a, b, c, d in texts]
        )
    return rows(number, kind="clm" if name in CAUSAL else "classification", seed=seed)


def tokenizer_of_words() -> BertTokenizerFast:
    """Of the texts of `data_of`, for trainers that read texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(50))]
    return BertTokenizerFast(vocab={word: n for n, word in enumerate(words)}, model_max_length=64)


def prepared(name: str, student: PreTrainedModel) -> PreTrainedModel:
    """`student`, packed or factorised where that is what the trainer trains."""
    if name == "RankGatesTrainer":
        return hfc.factorise(student, rank=8)
    return hfc.quantize(student, 3, group_size=16) if name == "ScaleTrainer" else student


def build(name: str, folder: Path, *, seed: int = 0, dropout: float | None = None, extra: dict | None = None,
          **options) -> Trainer:  # fmt: skip
    """The trainer or composition `name` with a fresh model. `options` go to its config, `extra` to the trainer."""
    case = COMPOSITIONS.get(name, Composition(name))
    name = case.trainer
    kind, config = getattr(hfc, name), getattr(hfc, name.replace("Trainer", "Config"))
    family, changes = ("llama", {}) if name in CAUSAL else ("bert", quiet(dropout))
    if name == "MarginMSETrainer":
        changes = {**changes, "num_labels": 1, "initializer_range": 0.3}  # margins of some size
    teacher = tiny_model(family, seed=3, **changes)
    torch.manual_seed(seed)
    student = case.student(prepared(name, make_student(teacher, num_hidden_layers=2)))
    arguments = {"train_dataset": data_of(name), "eval_dataset": data_of(name, 8, seed=1), **(extra or {})}
    arguments["callbacks"] = [*case.callbacks(), *arguments.get("callbacks", ())]
    if name == "MarginMSETrainer":
        arguments.setdefault("processing_class", tokenizer_of_words())
    if name == "MutualTrainer":
        arguments["peers"] = [tiny_model(family, seed=seed + 4, num_hidden_layers=1, **changes)]
    elif issubclass(kind, DistillationTrainer) and name != "SelfDistillationTrainer":
        arguments["teacher_model"] = case.teacher(teacher, student, folder)
    torch.manual_seed(seed)
    defaults = dict(use_cpu=True, max_steps=6, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                    save_strategy="no", disable_tqdm=True, learning_rate=1e-3)  # fmt: skip
    args = config(str(folder), **{**defaults, **OPTIONS.get(name, {}), **case.options, **options})
    return kind(None if "model_init" in arguments else student, args, **arguments)


def flat(value, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor and number inside nested mappings and lists."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: found for key, v in items for name, found in flat(v, f"{prefix}.{key}").items()}
    if isinstance(value, Tensor):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # sharded: what all ranks hold
        return {prefix: value.detach().clone()}
    return {prefix: torch.tensor(float(value))} if isinstance(value, (int, float)) else {}


class Snapshots(TrainerCallback):
    """Keeps what a trainer holds after its last step, before anything is cut: weights, state, optimiser, schedule."""

    def __init__(self):
        self.last: dict[str, Tensor] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        sys.audit("hf_compress.step", args.output_dir)
        if state.global_step == state.max_steps:
            training_state = getattr(model, "hfc_training_state", None)
            self.last = flat({
                "model": model.state_dict(), "state": {} if training_state is None else training_state.state_dict(),
                "optimizer": optimizer.state_dict(), "schedule": lr_scheduler.state_dict(),
            })  # fmt: skip


def run(name: str, folder: Path, resume: str | bool | None = None, **options) -> tuple[dict[str, Tensor], list[dict]]:
    """Everything the trainer holds in the end, and its logs without times."""
    trainer, snapshots = build(name, folder, **options), Snapshots()
    trainer.add_callback(snapshots)
    trainer.train(resume_from_checkpoint=resume)
    found = {**snapshots.last, **flat(trainer.model.state_dict(), "end")}
    timed = ("runtime", "per_second", "flos")
    logs = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
    return found, [entry for entry in logs if "train_loss" not in entry]  # the sum of a resumed run is of its own part


def assert_same(found: tuple[dict, list], expected: tuple[dict, list]) -> None:
    assert found[0].keys() == expected[0].keys() and found[0]
    for name, tensor in expected[0].items():
        assert torch.equal(tensor, found[0][name]), name
    assert found[1] == expected[1]


def child(job, folder: Path, kill_at: int = 0) -> tuple[int, int]:
    """Runs `job` in a fork; returns its status, and how many events it lived through.

    Events are steps and whatever happens to files under `folder`. At the one numbered `kill_at` the process is killed
    as by SIGKILL from outside.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "hf_compress.step") and str(
                args[0]
            ).startswith(str(folder)):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            job()
            status = 0
        except BaseException:  # told by the status; the test shows the text
            traceback.print_exc()
        finally:
            os.write(writing, str(count).encode())
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    text = os.read(reading, 100).decode()
    os.close(reading)
    return os.waitstatus_to_exitcode(status), int(text or 0)
