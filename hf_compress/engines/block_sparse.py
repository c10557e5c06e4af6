"""x W^T for a block-sparse W on the CPU: gathered activations and a batched product, or the dense product.

Block rows are sorted by their number of blocks and cut into buckets. Within a bucket each row gets as many blocks as
the fullest one has, the missing ones zeros, so that one batched product does them all:

    x^T in blocks (K / Bk, Bk, M)  --gather-->  (R, C * Bk, M);   (R, Bn, C * Bk) @ (R, C * Bk, M) = y^T in blocks

The activations are transposed first, which makes the gather a copy of long runs, and it goes by slices of rows that
stay in the cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engines import processor
from hf_compress.engines.ops import BlockSparseWeight, bsr_to_dense
from hf_compress.engines.routes import SMALLEST, BFloat16, Float32, Run

BUCKETS = 6
SLICE_BYTES = 1 << 20  # of gathered activations at a time: half the second-level cache of a core
DENSEST = {16: 0.25, 32: 0.4, 64: 0.5}  # share of stored blocks up to which gathering beats the dense product, by side


class Bucket(NamedTuple):
    rows: Tensor  # (R,) block rows
    columns: Tensor  # (R, C) block column of each block, 0 for the padding
    blocks: Tensor  # (R, Bn, C * Bk)


def make_run(weight: BlockSparseWeight, density: float) -> Run | None:
    """The product of inference with the blocks as they are now; None for the plain path.

    In bfloat16 where that is fast the dense product wins at every density, else few blocks are gathered in float32.
    """
    if processor.mode() == "reference" or weight.out_features * weight.in_features < SMALLEST:
        return None
    if weight.values.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.values.dtype is torch.bfloat16 and processor.mode() == "auto" and processor.has_bfloat16():
        return BFloat16(_Dense(weight))
    if density <= DENSEST[min(64, *weight.values.shape[1:])]:
        return Gathered(weight)
    return Float32(_Dense(weight))


class _Dense(NamedTuple):
    """A block-sparse weight, as the dense routes read theirs."""

    blocks: BlockSparseWeight

    def weight(self) -> "_Dense":
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return bsr_to_dense(self.blocks).to(dtype)


class Gathered:
    """The stored blocks in buckets. Error: float32 rounding."""

    name = "gathered blocks"

    def __init__(self, weight: BlockSparseWeight):
        weight = weight._replace(values=weight.values.float())
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.block_rows, (_, self.Bn, self.Bk) = len(weight.crow) - 1, weight.values.shape
        self.parts = buckets(weight)
        rows = [part.rows for part in self.parts]
        self.rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (M, K) -> (M, N)."""
        M, Bn, Bk = len(x), self.Bn, self.Bk
        columns_first = F.pad(x.float(), (0, -self.in_features % Bk)).t().contiguous().view(-1, Bk * M)
        y = columns_first.new_empty(len(self.rows), Bn, M)  # block rows in the order of the buckets
        done = 0
        for _, columns, blocks in self.parts:
            R, C = columns.shape
            at_once = max(1, min(R, SLICE_BYTES // (C * Bk * M * y.element_size())))
            buffer = y.new_empty(at_once * C, Bk * M)
            for start in range(0, R, at_once):
                n = slice(start, min(start + at_once, R))
                gathered = torch.index_select(
                    columns_first, 0, columns[n].flatten(), out=buffer[: (n.stop - start) * C]
                )
                torch.bmm(blocks[n], gathered.view(-1, C * Bk, M), out=y[done + start : done + n.stop])
            done += R
        if len(self.rows) < self.block_rows or len(self.parts) > 1:
            y = y.new_zeros(self.block_rows, Bn, M).index_copy_(0, self.rows, y)
        y = y.view(-1, M)[: self.out_features].t().contiguous()
        return (y if bias is None else y.add_(bias)).to(x.dtype)


def buckets(weight: BlockSparseWeight) -> list[Bucket]:
    """The blocks of `weight` by rows of nearly equal number; rows without any are left out."""
    num_blocks, Bn, Bk = weight.values.shape
    counts = weight.crow.diff().long()
    order = torch.argsort(counts, stable=True)
    order = order[counts[order] > 0]
    padded = torch.cat([weight.values, weight.values.new_zeros(1, Bn, Bk)])
    result = []
    for rows in _cut(order, counts):
        places = torch.arange(int(counts[rows].max()))  # (C,)
        there = places < counts[rows, None]  # (R, C)
        index = torch.where(there, weight.crow[rows, None].long() + places, num_blocks)
        columns = torch.where(there, weight.col[index.clamp(max=num_blocks)].long(), 0)
        blocks = padded[index].transpose(1, 2).flatten(2).contiguous()  # (R, Bn, C * Bk)
        result.append(Bucket(rows, columns, blocks))
    return result


def _cut(order: Tensor, counts: Tensor) -> list[Tensor]:
    """Rows, sorted by count, in at most `BUCKETS` parts, each a part of the range of counts."""
    if not len(order):
        return []
    low, high = int(counts[order[0]]), int(counts[order[-1]])
    step = max(1, -(-(high - low + 1) // BUCKETS))
    part = (counts[order] - low) // step
    return [order[part == i].sort().values for i in part.unique()]
