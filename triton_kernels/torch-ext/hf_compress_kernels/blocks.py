"""Block-sparse weights: blocks of values with their row index, and the transposed index that the gradient walks.

BSR as in torch: block row r holds values[crow[r] : crow[r + 1]], in block columns col[crow[r] : crow[r + 1]].
"""

from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_same_device

BLOCK_SIZES = (16, 32, 64, 128)
FINE_BLOCK_SIZES = (4, 8)  # legal masks; executed as blocks of 16 that hold them


class BlockSparseWeight(NamedTuple):
    """A weight (N, K) of which only some blocks are stored. Made by `bsr_from_dense` or `bsr_weight`.

    values  (num_blocks, Bn, Bk)
    crow    (block_rows + 1,) int32    where each block row starts
    col     (num_blocks + 1,) int32    block columns, and one entry of padding that kernels may read ahead
    crow_t, col_t                      the same for the transposed weight
    perm_t  (num_blocks,) int32        position in `values` of each block of the transposed weight
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm_t: Tensor
    out_features: int
    in_features: int

    @property
    def density(self) -> float:
        """Share of the blocks that are stored, at most 1: a block at the edge counts as one."""
        return block_density(self.values, self.out_features, self.in_features)


def block_density(values: Tensor, out_features: int, in_features: int) -> float:
    """Share of the blocks of a weight (N, K) that `values` (num_blocks, block rows, block columns) holds."""
    rows, columns = values.shape[1:]
    return len(values) / max(1, -(-out_features // rows) * -(-in_features // columns))


def check_block_size(block_size: Tuple[int, int], allowed: Tuple[int, ...] = BLOCK_SIZES) -> None:
    if len(block_size) != 2 or any(b not in allowed for b in block_size):
        raise ValueError(f"Blocks must have sides among {allowed}, got {tuple(block_size)}.")


def bsr_weight(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_features: int, in_features: int
) -> BlockSparseWeight:
    """A weight from its stored tensors, after checking every index.

    values        (num_blocks, Bn, Bk)  sides among 16, 32, 64 and 128
    crow_indices  (ceil(out_features / Bn) + 1,)  integers: 0, never falling, ending in num_blocks
    col_indices   (num_blocks,)  integers in [0, ceil(in_features / Bk)), rising within a block row

    Raises ValueError naming the tensor: an unchecked index would be read out of bounds on a device.
    """
    if values.ndim != 3:
        raise ValueError(f"values must be (num_blocks, Bn, Bk), got shape {tuple(values.shape)}.")
    check_block_size(tuple(values.shape[1:]))
    check_same_device(values=values, crow_indices=crow_indices, col_indices=col_indices)
    num_blocks, Bn, Bk = values.shape
    block_rows, block_cols = -(-out_features // Bn), -(-in_features // Bk)
    for name, index, length in (
        ("crow_indices", crow_indices, block_rows + 1),
        ("col_indices", col_indices, num_blocks),
    ):
        if index.shape != (length,) or index.is_floating_point():
            raise ValueError(f"{name} must be ({length},) integers, got {tuple(index.shape)} in {index.dtype}.")
    crow, col = crow_indices.long(), col_indices.long()
    if int(crow[0]) != 0 or int(crow[-1]) != num_blocks or bool((crow[1:] < crow[:-1]).any()):
        raise ValueError(f"crow_indices must rise from 0 to the number of blocks, {num_blocks}, and never fall.")
    if num_blocks and not 0 <= int(col.min()) <= int(col.max()) < block_cols:
        raise ValueError(f"col_indices must lie in [0, {block_cols}), got [{int(col.min())}, {int(col.max())}].")
    row = torch.repeat_interleave(torch.arange(block_rows, device=col.device), crow.diff())  # (num_blocks,)
    place = row * block_cols + col
    if bool((place[1:] <= place[:-1]).any()):
        raise ValueError("col_indices must rise within each block row, without repeats.")
    perm_t = torch.argsort(col * block_rows + row)
    crow_t = F.pad(torch.bincount(col, minlength=block_cols).cumsum(0), (1, 0))
    return BlockSparseWeight(
        values.contiguous(),
        crow.int(),
        F.pad(col, (0, 1)).int(),
        crow_t.int(),
        F.pad(row[perm_t], (0, 1)).int(),
        perm_t.int(),
        out_features,
        in_features,
    )


def bsr_from_dense(weight: Tensor, block_mask: Tensor, block_size: Tuple[int, int]) -> BlockSparseWeight:
    """Keep the blocks of `weight` (N, K) that `block_mask` (ceil(N / Bn), ceil(K / Bk)) marks.

    Blocks with a side of 4 or 8 are stored as the blocks of 16 that hold them: the result's `density` tells how many
    entries that is, and unmarked entries inside are stored as zeros. Differentiable from `values` to `weight`.
    """
    check_block_size(block_size, FINE_BLOCK_SIZES + BLOCK_SIZES)
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out_features, in_features), got shape {tuple(weight.shape)}.")
    N, K = weight.shape
    expected = (-(-N // block_size[0]), -(-K // block_size[1]))
    if block_mask.shape != expected:
        raise ValueError(
            f"block_mask must be {expected} for a weight {(N, K)} in blocks of {tuple(block_size)}, "
            f"got shape {tuple(block_mask.shape)}."
        )
    check_same_device(weight=weight, block_mask=block_mask)
    block_mask = block_mask.bool()
    Bn, Bk = (max(16, b) for b in block_size)
    if (Bn, Bk) != tuple(block_size):
        entries = block_mask.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)[:N, :K]
        weight = weight * entries
        steps = (Bn // block_size[0], Bk // block_size[1])
        block_mask = F.max_pool2d(block_mask[None].float(), steps, ceil_mode=True)[0].bool()
    padded = F.pad(weight, (0, -K % Bk, 0, -N % Bn))
    blocks = padded.unflatten(1, (-1, Bk)).unflatten(0, (-1, Bn)).transpose(1, 2)  # (rows, cols, Bn, Bk)
    crow = F.pad(block_mask.sum(1).cumsum(0), (1, 0))
    return bsr_weight(blocks[block_mask], crow, block_mask.nonzero()[:, 1], N, K)


def block_rows(crow: Tensor, num_blocks: int) -> Tensor:
    """The block row of each block, (num_blocks,) int64."""
    positions = torch.arange(num_blocks, device=crow.device, dtype=crow.dtype)
    return torch.searchsorted(crow[1:].contiguous(), positions, right=True)


def bsr_to_dense(weight: BlockSparseWeight) -> Tensor:
    """The dense (out_features, in_features) weight, zero where no block is stored. Differentiable in `values`."""
    values, (N, K) = weight.values, (weight.out_features, weight.in_features)
    num_blocks, Bn, Bk = values.shape
    rows, cols = -(-N // Bn), -(-K // Bk)
    place = block_rows(weight.crow, num_blocks) * cols + weight.col[:num_blocks]
    blocks = values.new_zeros(rows * cols, Bn, Bk).index_copy(0, place.long(), values)
    return blocks.unflatten(0, (rows, cols)).transpose(1, 2).reshape(rows * Bn, cols * Bk)[:N, :K]


def gather_blocks(dense: Tensor, crow: Tensor, col: Tensor, num_blocks: int, block_size: Tuple[int, int]) -> Tensor:
    """The stored blocks (num_blocks, Bn, Bk) of a dense (N, K) matrix."""
    Bn, Bk = block_size
    N, K = dense.shape
    blocks = F.pad(dense, (0, -K % Bk, 0, -N % Bn)).unflatten(1, (-1, Bk)).unflatten(0, (-1, Bn)).transpose(1, 2)
    return blocks[block_rows(crow, num_blocks), col[:num_blocks].long()]
