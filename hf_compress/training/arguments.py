"""What all our trainers can be told, and how: their arguments are those of `Trainer`, in its order."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

DROPS = re.compile(r"(^|_)dropout(_p|_prob|_rate)?$")  # how modules call a share that their forward drops


@dataclass
class CompressionArguments(TrainingArguments):
    """Arguments of `Trainer`, whether the training ends in the finished model, and how much dropout it has."""

    finish_at_end: bool = field(
        default=True,
        metadata={
            "help": "Finish the model at the end of train(): cut what fell silent, pack what was rounded. Without it, "
            "`trainer.finish()` does so."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Of the trained model while it trains, wherever it has any; as its configuration says by default. "
            "0 suits a small student with much text, and is faster on a CPU, where random numbers cost time."
        },
    )

    def __post_init__(self):
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share of the activations, at least 0 and below 1, got {self.dropout}.")
        super().__post_init__()


@contextmanager
def dropping(model: nn.Module, share: float | None) -> Iterator[None]:
    """`model` with this dropout wherever it has one, while open; as it is for None."""
    changed = {}
    for module in model.modules() if share is not None else ():
        found = vars(module)
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else filter(DROPS.search, found)
        changed |= {(module, name): share for name in names if type(found[name]) in (float, int)}
        if isinstance(found.get("config"), PretrainedConfig) and not isinstance(module, PreTrainedModel):
            changed[module, "config"] = _dropping(found["config"], share)  # Falcon's layers ask it in each forward
    before = {(module, name): vars(module)[name] for module, name in changed}
    try:
        for (module, name), value in changed.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def _dropping(config: PretrainedConfig, share: float) -> PretrainedConfig:
    """A configuration like it for the layers alone: what is saved on the way is the model's own."""
    config = copy.copy(config)
    for name, value in vars(config).items():
        if DROPS.search(name) and type(value) in (float, int):
            setattr(config, name, share)
    return config


def checked(args: TrainingArguments | None, kind: type[TrainingArguments], who: str) -> TrainingArguments:
    """`args`, or the defaults of `kind`. Raises TypeError for those of another trainer."""
    args = kind("trainer_output") if args is None else args
    if not isinstance(args, kind):
        raise TypeError(
            f"{who} needs args of type {kind.__name__}, got {type(args).__name__}. Its arguments are those of "
            "TrainingArguments and a few more."
        )
    return args


def by_name(positional: Sequence[Any], given: Mapping[str, Any], who: str) -> dict[str, Any]:
    """What follows the model and its arguments in a call, by the names that `Trainer` gives them.

    Raises TypeError for what is given twice, and for a teacher or peers in the place of the collator.
    """
    names = list(inspect.signature(Trainer.__init__).parameters)[3:]  # after self, model, args
    found = dict(zip(names, positional, strict=False))
    if twice := sorted(found.keys() & given.keys()):
        raise TypeError(f"{who} was given {twice[0]} twice.")
    collator = found.get("data_collator")
    if hasattr(collator, "parameters") or not (collator is None or callable(collator)):
        raise TypeError(
            f"The third argument of {who} is the data_collator, as in Trainer, got {type(collator).__name__}. Give a "
            "teacher by its name: teacher_model=..., and peers by theirs."
        )
    return {**found, **given}


def check_devices(args: TrainingArguments, who: str) -> None:
    """Raise ValueError for several devices in one process, where hooks and what a training keeps would be copied."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{who} would copy the model to {args.n_gpu} devices for each batch (DataParallel). Start one process a "
            "device, by torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one."
        )
