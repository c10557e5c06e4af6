"""What is asked before a training begins: how its loss is divided, whether its weights can be changed, and what tells
the models, data and settings of one process from those of another."""

import ast
import hashlib
import inspect
import random
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_compress.model.tasks import Task, auto_class_name, plain_model, problem_of
from hf_compress.training.shards import is_sharded
from hf_compress.version import __version__

ALIKE = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
         "gradient_accumulation_steps", "learning_rate", "optim", "lr_scheduler_type", "save_strategy", "save_steps",
         "eval_strategy", "eval_steps", "logging_steps")  # fmt: skip
SAMPLES = 64  # values of a weight that are compared


def has_own_mean(model: nn.Module) -> bool:
    """Whether the loss of a Transformers model is the mean over its batch, whatever `num_items_in_batch` says.

    It is where forward computes a loss itself, or calls the common one without what it was told of the whole step; and
    of spans, several labels and numbers everywhere: `num_items_in_batch` does not count them. `Trainer` believes each
    forward with **kwargs to divide by it.
    """
    plain = plain_model(model)
    source = _source_of_forward(type(plain))
    if "loss_fct" not in source and (auto_class_name(plain) is None or "loss" not in source):
        return False  # a loss of the user's own, which is believed, or none
    if Task.of(plain).kind == "spans" or problem_of(plain) != "one_label":
        return True
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    common = [call for call in calls if getattr(call.func, "attr", None) == "loss_function"]
    return not common or any(all(keyword.arg is not None for keyword in call.keywords) for call in common)


def _source_of_forward(kind: type) -> str:
    """The text of a class's forward, and of those that it calls by super(); empty where there is none."""
    found = ""
    try:
        for base in kind.__mro__:
            if "forward" in vars(base):
                own = textwrap.dedent(inspect.getsource(vars(base)["forward"]))
                found += own
                if "super()" not in own:
                    break
    except (OSError, TypeError):
        return ""
    return found


def check_own_gradients(args: TrainingArguments, what: str) -> None:
    """Raise ValueError under DeepSpeed, which keeps gradients and the weights it updates in buffers of its own."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        raise ValueError(
            f"{what} while training reads and changes gradients and weights, but DeepSpeed works on copies of its own. "
            "Train with DDP, FSDP2 or on one device, or do it before or after training."
        )


def settings_facts(args: TrainingArguments) -> dict[str, str]:
    """Versions, and the settings that say what is computed and when ranks wait for each other: name -> value."""
    versions = {"hf_compress": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    ours = [kind for kind in type(args).__mro__ if kind.__module__.startswith("hf_compress.")]
    own = [name for kind in ours for name in inspect.get_annotations(kind)]
    settings = {name: str(getattr(args, name)) for name in (*ALIKE, *own)}
    return {**{f"the version of {name}": found for name, found in versions.items()}, **settings}


def weights_fact(model: nn.Module, *, values: bool = True) -> str:
    """What tells a model from another: its class, names and shapes and, with `values`, a few values of each weight."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            if values and not (tensor.is_meta or is_sharded(tensor)):
                flat = tensor.detach().flatten()
                digest.update(str(flat[:: max(1, len(flat) // SAMPLES)].tolist()).encode())
    return f"a {type(plain_model(model)).__name__} ({digest.hexdigest()[:8]})"


def data_fact(dataset: Any) -> str:
    """What tells a data set from another: how many examples, and three of them, where they are the same twice."""
    if isinstance(dataset, Mapping):
        return ", ".join(f"{name}: {data_fact(part)}" for name, part in dataset.items())
    if dataset is None or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return "none" if dataset is None else "a stream"
    number = len(dataset)
    with _kept_random_states():
        read = [[_content(dataset[i]) for i in sorted({0, number // 2, number - 1}) if number] for _ in range(2)]
    known = hashlib.sha256(str(read[0]).encode()).hexdigest()[:8] if read[0] == read[1] else "drawn anew"
    return f"{number} examples ({known})"


def _content(example: Any) -> Any:
    """Numbers and texts of an example; of all else the type, for what it is printed as may be the place in memory."""
    if hasattr(example, "tolist"):
        return _content(example.tolist())
    if isinstance(example, Mapping):
        return [(str(name), _content(value)) for name, value in example.items()]
    if isinstance(example, (list, tuple)):
        return [_content(value) for value in example]
    return example if isinstance(example, (str, bytes, int, float, type(None))) else type(example).__name__


@contextmanager
def _kept_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 what data sets draw by
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
