"""The base of callbacks that leave something to finish, and of hooks that only watch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_compress.model.unfinished import forget_reminder, remind
from hf_compress.training.finish import finish
from hf_compress.training.pieces import Piece, join
from hf_compress.training.shards import check_shards, put_away


class PieceCallback(Piece, TrainerCallback):
    """A piece that works while a `Trainer` trains, one of Transformers or one of ours.

    While it is not done, no evaluation counts for the best checkpoint: what a model reaches before it is pruned, or
    with more bits, is no measure for what it will be. The patience of an early stopping begins when it is done.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module = None, **kwargs
    ) -> None:
        put_away(model)
        forget_reminder(model)  # a checkpoint holds the weights alone, as it should
        check_shards(model, type(self).__name__)
        join(model, self)

    def on_step_begin(self, args, state: TrainerState, control, **kwargs) -> None:
        if not self.is_done(state.global_step):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module = None, **kwargs
    ) -> None:
        if model is not None:
            put_away(model)
            remind(model)

    def finish(self, model: nn.Module) -> nn.Module:
        """`hfc.finish(model)`, which ends this and everything else that training left open."""
        return finish(model)


class WhileTraining:
    """A hook that only looks on, and pickles, and is copied, as one that does nothing.

    `torch.save(model)` and `copy.deepcopy(model)` work in a callback, and nobody watches what they give. A hook that
    has a say in what the model computes is a method of its piece instead, and goes with the copy.
    """

    def __init__(self, hook: Callable):
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _nothing_done, ()


def is_recomputing() -> bool:
    """Whether a backward pass is running: gradient checkpointing runs layers again in it, on inputs that were seen.

    `torch.utils.module_tracker` tells it so.
    """
    return torch._C._current_graph_task_id() != -1


def _nothing_done() -> Callable:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None: ...
