"""Classes made at run time: a layer of ours between a class of Transformers and the plain one that it extends."""

from functools import cache
from typing import Any

from torch import nn


@cache
def insert_class(kind: type[nn.Module], mixin: type[nn.Module], prefix: str) -> type[nn.Module]:
    """A class that keeps what `kind` adds, and whose `super()` is `mixin`: one for each pair, and it can be pickled.

    What `kind` does when it is made is not done again: make an instance with `__new__`.
    """

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _make_empty, (kind, mixin, prefix), state

    return type(f"{prefix}{kind.__name__}", (kind, mixin), {"__reduce_ex__": reduce, "__module__": mixin.__module__})


def _make_empty(kind: type[nn.Module], mixin: type[nn.Module], prefix: str) -> nn.Module:
    made = insert_class(kind, mixin, prefix)
    return made.__new__(made)
