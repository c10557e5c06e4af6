"""What all our trainers can be told, and how: their arguments are those of `Trainer`, in its order."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainingArguments


@dataclass
class CompressionArguments(TrainingArguments):
    """Arguments of `Trainer`, and whether the training ends in the finished model."""

    finish_at_end: bool = field(
        default=True,
        metadata={
            "help": "Finish the model at the end of train(): cut what fell silent, pack what was rounded. Without it, "
            "`trainer.finish()` does so."
        },
    )


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
