"""Run-time layout of low-bit weights: planes of int16 words, a tile at a time. Private; nothing on disk uses it.

Weights (N, K) are padded to tiles of 64 rows and `tile_k` columns, and a tile is stored contiguously. In a tile, word t
of a row holds the values of columns j * P + t in bits [j * bits, (j + 1) * bits), for the planes j = 0 .. 16 / bits - 1
and P = tile_k * bits / 16. So one plane is a contiguous slice of columns, and a kernel dequantizes it with bit
operations on whole words and no shuffle.

    2, 4, 8 bit   int16 (N / 64, K / tile_k, 64 * P)
    3 bit         int16 (N / 64, K / 256, 64 * 48): 64 rows of two words of crumbs per column (16 planes of 16 columns,
                  eight in each word), then 64 rows of one word per column with the third bits, see `THIRD_BIT`

Scales and zero points are `sz`: int32 (G, N), low half the scale and high half zero + `magic`, both in the dtype of the
activations, so that one 4-byte load brings both; or, for float32 activations, float32 (2, G, N) of scales and zeros.
"""

import math
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import check_bits

TILE_N = 64
# Bit of the third-bit word that belongs to plane 8 * h + j. Chosen so that few shifts bring it next to its crumb.
THIRD_BIT = [h if j == 7 else 2 * (j % 4) + 2 + h + 8 * (j >= 4) for h in range(2) for j in range(8)]


class PackedWeight(NamedTuple):
    """A low-bit weight as the operators take it. Made by `wna16_pack` or `gptq_repack`.

    qweight       int16, the layout of this module
    sz            scales and zero points of `dtype` activations
    perm          (K,) int32 or None: column i of the packed weight is column perm[i] of the weight (act-order)
    tickets       int32 (2, N / 8), zeros before and after each product, see `new_tickets`
    """

    qweight: Tensor
    sz: Tensor
    perm: Optional[Tensor]
    tickets: Optional[Tensor]
    bits: int
    group_size: int
    out_features: int
    in_features: int
    tile_k: int
    dtype: torch.dtype


def new_tickets(out_features: int, device: torch.device) -> Tensor:
    """Zeros by which the programs of a product tell who of them ends a tile last: one for each tile of up to 64 rows.

    They belong to the weight, so that a launch allocates none and launches share none: the first row is for the default
    stream, the second for CUDA graphs.
    """
    rows = -(-out_features // TILE_N)
    return torch.zeros(2, rows * (TILE_N // 8), dtype=torch.int32, device=device)


def magic(bits: int, dtype: torch.dtype) -> int:
    """A power of two whose lowest mantissa bits are free for an integer: magic + q is (bits of magic) | q.

    bfloat16 has 7 mantissa bits, too few for 8-bit integers: those are converted instead, and magic is 0.
    """
    if dtype == torch.float16:
        return 1024
    return 128 if bits < 8 else 0


def plane_width(bits: int, tile_k: int) -> int:
    """P, the columns of one plane."""
    return 16 if bits == 3 else tile_k * bits // 16


def choose_tile_k(bits: int, in_features: int, group_size: int) -> int:
    """Columns of a tile for a weight of `in_features` columns: 256 at 2 and 3 bit, else 128, or 64 where that fits.

    Raises ValueError when a plane of the tile would cross groups.
    """
    check_bits(bits)
    if bits in (2, 3):
        candidates = [256]
    elif -(-in_features // 64) % 2:
        candidates = [64]
    else:
        candidates = [128, 64]
    for tile_k in candidates:
        if group_size >= in_features or group_size % plane_width(bits, tile_k) == 0:
            return tile_k
    raise ValueError(
        f"group_size must be a multiple of {plane_width(bits, candidates[-1])} for {bits}-bit weights with "
        f"{in_features} columns, or the whole row; got {group_size}."
    )


def pack_planes(ints: Tensor, bits: int, tile_k: int) -> Tensor:
    """Integers (N, K) uint8 in [0, 2^bits - 1] as int16 words in the layout above."""
    N, K = ints.shape
    ints = F.pad(ints, (0, -K % tile_k, 0, -N % TILE_N)).int()
    P = plane_width(bits, tile_k)
    tiles = ints.reshape(-1, TILE_N, ints.shape[1] // tile_k, tile_k // P, P).transpose(1, 2)  # (N/64, K/KT, 64, j, P)
    if bits != 3:
        return _or_planes(tiles, [bits * j for j in range(tile_k // P)]).flatten(-2)
    crumbs = [_or_planes(tiles[..., 8 * h : 8 * h + 8, :] & 3, range(0, 16, 2)) for h in range(2)]
    low = torch.stack(crumbs, dim=-2)  # (N/64, K/256, 64, 2, 16)
    high = _or_planes(tiles >> 2, THIRD_BIT)  # (N/64, K/256, 64, 16)
    return torch.cat([low.flatten(-3), high.flatten(-2)], dim=-1)


def unpack_planes(qweight: Tensor, bits: int, tile_k: int, out_features: int, in_features: int) -> Tensor:
    """The inverse of `pack_planes`: uint8 (N, K)."""
    P = plane_width(bits, tile_k)
    if bits != 3:
        words = qweight.unflatten(-1, (TILE_N, 1, P)).int()
        shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=qweight.device)[:, None]  # (j, 1)
        planes = (words >> shifts) & ((1 << bits) - 1)  # (N/64, K/KT, 64, j, P)
    else:
        low, high = qweight.int().split([TILE_N * 32, TILE_N * 16], dim=-1)
        low = low.unflatten(-1, (TILE_N, 2, 1, 16))
        crumbs = (low >> torch.arange(0, 16, 2, dtype=torch.int32, device=qweight.device)[:, None]) & 3
        third = torch.tensor(THIRD_BIT, dtype=torch.int32, device=qweight.device)[:, None]
        planes = crumbs.flatten(-3, -2) | ((high.unflatten(-1, (TILE_N, 1, 16)) >> third) & 1) << 2
    rows = planes.transpose(1, 2).reshape(qweight.shape[0] * TILE_N, -1)
    return rows[:out_features, :in_features].to(torch.uint8)


def pack_sz(scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype, groups: int) -> Tensor:
    """Scales and integer zero points, both (G, N), as `sz` for `dtype` activations, padded to (groups, 64 n)."""
    G, N = scales.shape
    pad = (0, -N % TILE_N, 0, groups - G)
    if dtype in (torch.float32, torch.float64):
        return F.pad(torch.stack([scales.float(), zeros.float()]), pad)
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"Activations must be float16, bfloat16 or float32, got {dtype}.")
    rounded = scales.to(dtype)
    if not bool(torch.isfinite(rounded).all()) or bool(((rounded == 0) & (scales != 0)).any()):
        raise ValueError(
            f"scales do not fit {dtype}: they span [{float(scales.abs().min())}, {float(scales.abs().max())}]. "
            "Use bfloat16 or float32 activations for this layer."
        )
    halves = torch.stack([rounded, (zeros.float() + magic(bits, dtype)).to(dtype)], dim=-1)  # (G, N, 2)
    return F.pad(halves.view(torch.int32).squeeze(-1), pad)


def unpack_sz(sz: Tensor, bits: int, dtype: torch.dtype, out_features: int) -> Tuple[Tensor, Tensor]:
    """Scales and zero points (G, N) of a `sz` made for `dtype`, both in `dtype`."""
    if sz.dtype == torch.float32:
        scales, zeros = sz[..., :out_features].to(dtype)
        return scales, zeros
    halves = sz[:, :out_features].contiguous().view(dtype).unflatten(-1, (-1, 2))  # (G, N, 2)
    return halves[..., 0], halves[..., 1] - magic(bits, dtype)


def num_groups(in_features: int, tile_k: int, group_size: int) -> int:
    """Rows of `sz`: the groups that the padded columns touch."""
    if group_size >= in_features:
        return 1
    return math.ceil(math.ceil(in_features / tile_k) * tile_k / group_size)


def _or_planes(planes: Tensor, shifts) -> Tensor:
    """(..., j, P) integers -> (..., P) int16, plane j moved to bit shifts[j]."""
    words = torch.zeros_like(planes[..., 0, :])
    for j, shift in enumerate(shifts):
        words |= planes[..., j, :] << shift
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
