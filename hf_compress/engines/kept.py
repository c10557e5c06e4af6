"""What was made from tensors and is found by them: dropped with the first one, forgotten when one is written to."""

import weakref
from collections.abc import Sequence

from torch import Tensor

# id of the first tensor -> all of them (weak references and versions), and what was made from them
_kept: dict[int, tuple[tuple, dict]] = {}


def kept_for(tensors: Sequence[Tensor | None]) -> dict:
    """The dictionary that belongs to `tensors`, empty at first and after one was replaced or changed in place.

    The first one must be there. A change in place of an inference tensor has no trace and is not seen.
    """
    key = id(tensors[0])
    entry = _kept.get(key)
    if entry is not None:
        for (reference, version), tensor in zip(entry[0], tensors, strict=True):
            if reference() is not tensor or (tensor is not None and version != _version(tensor)):
                break
        else:
            return entry[1]
    seen = tuple((_nothing, 0) if tensor is None else (weakref.ref(tensor), _version(tensor)) for tensor in tensors)
    _kept[key] = (seen, {})
    weakref.finalize(tensors[0], _forget, key, seen).atexit = False
    return _kept[key][1]


def _nothing() -> None:
    """The reference to a tensor that is not there."""


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _forget(key: int, seen: tuple) -> None:
    """Drop what belongs to a tensor that is gone, unless another one took its place."""
    if key in _kept and _kept[key][0] is seen:
        del _kept[key]
