"""Hooks that watch the running training, which a copy of the model does not have."""

from collections.abc import Callable
from typing import Any


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


def _nothing_done() -> Callable:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None: ...
