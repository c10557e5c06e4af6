"""Rows in pieces of few sizes: oneDNN compiles a kernel for each number of rows, and keeps it.

A kernel takes up to a megabyte and milliseconds to make, so thousands of lengths would fill the memory. Here all
lengths are made of eleven.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST, LARGEST = 8, 4096  # powers of two; a single row is a piece of its own
SIZES = frozenset({1, *(SMALLEST << n for n in range((LARGEST // SMALLEST).bit_length()))})
MOST_PADDING = 1 / 8  # of the rows of a piece, unless it is the smallest


def pieces(rows: int) -> Iterator[tuple[int, int]]:
    """Rows of each piece, and the size it is filled up to.

    >>> list(pieces(4096)), list(pieces(120)), list(pieces(75))
    ([(4096, 4096)], [(120, 128)], [(64, 64), (8, 8), (3, 8)])
    """
    while rows:
        size = 1 if rows == 1 else min(max(SMALLEST, 1 << (rows - 1).bit_length()), LARGEST)
        if size > SMALLEST and size - rows > rows * MOST_PADDING:
            size //= 2
        yield min(rows, size), size
        rows -= min(rows, size)


def in_pieces(x: Tensor, multiply: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """`multiply` (m, K) -> (m, width), in `dtype`, for each piece of the rows of x (M, K)."""
    if x.shape[0] in SIZES:
        return multiply(x)
    y, start = x.new_empty(x.shape[0], width, dtype=dtype), 0
    for rows, size in pieces(x.shape[0]):
        part = x[start : start + rows]
        if rows < size:
            part = F.pad(part, (0, 0, 0, size - rows))
        y[start : start + rows] = multiply(part)[:rows]
        start += rows
    return y
