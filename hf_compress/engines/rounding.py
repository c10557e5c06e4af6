"""Activations rounded to bytes: in few passes, and once for all layers that read the same tensor."""

import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_INT8 = 127  # per token the grid is symmetric
LEVELS = 255  # steps of a calibrated range
MIDDLE = 128  # the zero point per token: u8 with it are the same products as s8, and fast on every x86
TO_INTEGER = 1.5 * 2**23  # added to a small float32, it leaves the nearest integer, ties to even, in the lowest bits
AT_ONCE = 512  # rows: what lies between two passes stays in the cache
TINY = torch.finfo(torch.float32).tiny  # a scale for tokens of zeros

_last = threading.local()


class Rounded(NamedTuple):
    """x ~ scale * (q - zero)."""

    q: Tensor  # (M, K) uint8
    scale: Tensor  # (M, 1) or (1, 1) float32
    zero: int


Range = tuple[float, float] | None  # a calibrated range; None: each row has the symmetric grid of its largest value


def round_to_bytes(x: Tensor, activation_range: Range = None) -> Rounded:
    """x (M, K) on its 8-bit grid, as integers."""
    return _once(_bytes, x, activation_range)


def rounded_rows(x: Tensor, activation_range: Range = None) -> Tensor:
    """x (M, K) on its 8-bit grid, in its dtype."""
    return _once(_floats, x, activation_range)


def _once(make: Callable, x: Tensor, activation_range: Range):
    """`make(x, activation_range)`, or what it gave for the same tensor just before in this thread.

    Query, key and value read one tensor in a row, so the last result is kept with a weak reference to its input. A
    change in place of an inference tensor leaves no trace: beside it lies a copy to compare with.
    """
    if x.is_inference():
        seen, key = None, (make, x.dtype, x.shape, activation_range)
    else:
        seen = x if x._base is None else x._base
        key = (make, seen._version, x.data_ptr(), x.shape, x.stride(), activation_range)
    found = getattr(_last, "entry", None)
    if found is not None and found[0] == key and (torch.equal(x, found[1]) if seen is None else found[1]() is seen):
        return found[2]
    made = make(x, activation_range)
    _last.entry = key, x.clone() if seen is None else weakref.ref(seen), made
    return made


def _bytes(x: Tensor, activation_range: Range) -> Rounded:
    if x.shape[0] <= AT_ONCE:
        return _few_bytes(x, activation_range)
    parts = [_few_bytes(part, activation_range) for part in x.split(AT_ONCE)]
    scale = parts[0].scale if len(parts[0].scale) == 1 else torch.cat([part.scale for part in parts])
    return Rounded(torch.cat([part.q for part in parts]), scale, parts[0].zero)


def _few_bytes(x: Tensor, activation_range: Range) -> Rounded:
    steps, scale, zero = _steps(x, activation_range)
    # a half goes to the even step, which an odd zero point would make an odd one: that is added to the bytes
    odd = zero % 2
    q = steps.add_(TO_INTEGER + zero - odd).view(torch.int32).to(torch.uint8)
    scale = scale if isinstance(scale, Tensor) else torch.full((1, 1), scale)
    return Rounded(q.add_(odd) if odd else q, scale, zero)


def _floats(x: Tensor, activation_range: Range) -> Tensor:
    steps, scale, _ = _steps(x, activation_range)
    return steps.round_().mul_(scale).to(x.dtype)  # adding 1.5 * 2^23 would round float32 alone


def _steps(x: Tensor, activation_range: Range) -> tuple[Tensor, Tensor | float, int]:
    """x / scale, within the grid; the scale, (M, 1) or a number, which costs a fifth of a tensor; the zero point."""
    if activation_range is not None or x.dtype is not torch.float64:
        x = x.float()  # operators of two dtypes take twice as long
    if activation_range is None:
        largest = x.abs().amax(1, keepdim=True)
        scale = largest.float().div_(LARGEST_INT8).clamp_(min=TINY)
        return x / scale, scale, MIDDLE
    scale, zero = grid_of_range(*activation_range)
    return (x / scale).clamp_(-zero, LEVELS - zero), scale, int(zero)


@lru_cache(maxsize=4096)  # a range for each layer, asked for in each call
def grid_of_range(low: float, high: float) -> tuple[float, float]:
    """Scale and zero point of the 8-bit grid over [low, high], which holds zero: float32 values as plain numbers."""
    # also where a model is built on the meta device, and in another dtype than that of its training
    low, high = (torch.tensor(end, device="cpu", dtype=torch.float32) for end in (low, high))
    scale = (high - low) / LEVELS
    return scale.item(), (-low / scale).round().item()
