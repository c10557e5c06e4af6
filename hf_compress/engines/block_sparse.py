"""x W^T for a block-sparse W on the CPU: gathered activations and a batched product, or the dense product.

Block rows are sorted by their number of blocks and cut into buckets. Within a bucket each row gets as many blocks as
the fullest one has, the missing ones zeros, so that one batched product does them all:

    x^T in blocks (K / Bk, Bk, M)  --gather-->  (R, C * Bk, M);   (R, Bn, C * Bk) @ (R, C * Bk, M) = y^T in blocks

The activations are transposed first, which makes the gather a copy of long runs, and it goes by slices of rows that
stay in the cache. The precision is that of x. The layout is made from the stored blocks and found by their tensor: it
is no state, and is made again when the blocks change.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engines import processor
from hf_compress.engines.kept import kept_for
from hf_compress.engines.ops import BlockSparseWeight, bsr_to_dense

BUCKETS = 6
DENSEST_FOR_MKL = 0.3  # AMX, one thread: 3.4 times the dense product at 0.1, 1.4 times at 0.25, 0.75 at 0.5
SLICE_BYTES = 1 << 20  # of gathered activations at a time: half the second-level cache of a core


class Bucket(NamedTuple):
    rows: Tensor  # (R,) block rows
    columns: Tensor  # (R, C) block column of each block, 0 for the padding
    blocks: Tensor  # (R, Bn, C * Bk)


def bsr_linear(x: Tensor, weight: BlockSparseWeight, bias: Tensor | None) -> Tensor | None:
    """The engine for the operator of this name: x (M, K) -> (M, N). None leaves a call to the plain path."""
    N, K = weight.out_features, weight.in_features
    if processor.mode() == "reference" or N * K < processor.SMALLEST or not len(x):
        return None
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.values.is_inference():
        return None
    made = kept_for([weight.values, weight.crow, weight.col])
    if len(x) == 1 and _mkl_takes(weight):
        if "mkl" not in made:
            made["mkl"] = _torch_bsr(weight)
        return F.linear(x, made["mkl"], bias)
    if weight.density > processor.densest(x.dtype, min(weight.values.shape[1:]), len(x), N * K):
        if "dense" not in made:
            made["dense"] = _dense(weight)
        return made["dense"](x, bias)
    if "buckets" not in made:
        made["buckets"] = buckets(weight)
    return _gathered(x, weight, made["buckets"], bias)


def _mkl_takes(weight: BlockSparseWeight) -> bool:
    """Whether MKL's block-sparse product with one vector is possible, and faster than the dense product."""
    (N, K), (_, Bn, Bk) = (weight.out_features, weight.in_features), weight.values.shape
    whole_squares = Bn == Bk and N % Bn == 0 and K % Bk == 0 and len(weight.values) > 0
    is_float32 = weight.values.dtype is torch.float32
    return is_float32 and whole_squares and weight.density <= DENSEST_FOR_MKL and torch.backends.mkl.is_available()


def _torch_bsr(weight: BlockSparseWeight) -> Tensor:
    """The same storage as a sparse tensor of PyTorch's; detached, so that it does not keep the blocks' tensor alive."""
    values = weight.values.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "in beta state"
        return torch.sparse_bsr_tensor(
            weight.crow, weight.col[: len(values)], values, (weight.out_features, weight.in_features)
        )


def _dense(weight: BlockSparseWeight) -> Callable[[Tensor, Tensor | None], Tensor]:
    dense = bsr_to_dense(weight)
    if dense.dtype is not torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x, bias: F.linear(x, dense, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(dense, None)
    return lambda x, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


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


def _gathered(x: Tensor, weight: BlockSparseWeight, parts: list[Bucket], bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, weight.out_features
    _, Bn, Bk = weight.values.shape
    columns_first = F.pad(x, (0, -K % Bk)).t().contiguous().view(-1, Bk * M)  # (K / Bk, Bk * M)
    stored, block_rows = sum(len(part.rows) for part in parts), len(weight.crow) - 1
    y = x.new_empty(stored, Bn, M)  # block rows in the order of the buckets
    done = 0
    for _, columns, blocks in parts:
        R, C = columns.shape
        at_once = max(1, min(R, SLICE_BYTES // (C * Bk * M * x.element_size())))
        buffer = x.new_empty(at_once * C, Bk * M)
        for start in range(0, R, at_once):
            n = slice(start, min(start + at_once, R))
            gathered = torch.index_select(columns_first, 0, columns[n].flatten(), out=buffer[: (n.stop - start) * C])
            torch.bmm(blocks[n], gathered.view(-1, C * Bk, M), out=y[done + start : done + n.stop])
        done += R
    if stored < block_rows or len(parts) > 1:
        rows = torch.cat([part.rows for part in parts] or [torch.zeros(0, dtype=torch.int64)])
        y = x.new_zeros(block_rows, Bn, M).index_copy_(0, rows, y)
    y = y.view(-1, M)[:N].t().contiguous()
    return y if bias is None else y.add_(bias)
