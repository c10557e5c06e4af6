"""Hooks of the running training, which a copy of the model does not have."""

from collections.abc import Callable
from typing import Any


class WhileTraining:
    """A hook that pickles, and is copied, as one that does nothing: `torch.save(model)` and `copy.deepcopy(model)` work
    in a callback, and what they give is no part of the training."""

    def __init__(self, hook: Callable):
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _nothing_done, ()


def _nothing_done() -> Callable:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None: ...
