"""Classes made at run time: one of ours before one of Transformers, or between that and the plain one it extends."""

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what is changed and returned has the class that it came with
ModuleT = TypeVar("ModuleT", bound=nn.Module)
ModelT = TypeVar("ModelT", bound="PreTrainedModel")


@cache
def made_class(name: str, *bases: type) -> type:
    """A class of these bases and nothing else: one for each name and bases, and what is of it can be pickled.

    What a base does when it is made is not done again: make an instance with `__new__`, or give a module the class.
    """

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _make_empty, (name, *bases), state

    return type(name, bases, {"__reduce_ex__": reduce, "__module__": __name__})


def plain_class(module: nn.Module) -> type:
    """The class of `module`; of one that was made here, the base that is not ours."""
    kind = type(module)
    if kind.__module__ != __name__:
        return kind
    return next(base for base in kind.__bases__ if not base.__module__.startswith(__name__.partition(".")[0]))


def _make_empty(name: str, *bases: type) -> nn.Module:
    made = made_class(name, *bases)
    return made.__new__(made)
