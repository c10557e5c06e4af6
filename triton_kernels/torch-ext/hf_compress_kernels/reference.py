"""Plain PyTorch bodies of the low-bit operators: correct, simple, and what the CPU runs."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import float_accumulator
from .planes import TILE_N, PackedWeight, unpack_planes, unpack_sz

EXACT_COLUMNS = 1024  # of 8-bit products that float32, the widest float of some devices, sums exactly: below 2^24
ROWS_AT_ONCE = 1024  # output features dequantized together, to bound memory


def _dequantize(ints: Tensor, scales: Tensor, zeros: Tensor, perm: Optional[Tensor], group_size: int) -> Tensor:
    """scale * (q - zero) for ints (N, K) and scales, zeros (G, N); columns back in the weight's own order."""
    K = ints.shape[1]
    group = torch.arange(K, device=ints.device) // group_size
    weight = (ints.to(scales.dtype) - zeros.t()[:, group]) * scales.t()[:, group]  # (N, K)
    if perm is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, perm.long(), weight)


def wna16_dequant(weight: PackedWeight) -> Tensor:
    ints = unpack_planes(weight.qweight, weight.bits, weight.tile_k, weight.out_features, weight.in_features)
    scales, zeros = unpack_sz(weight.sz, weight.bits, weight.dtype, weight.out_features)
    return _dequantize(ints, scales, zeros, weight.perm, weight.group_size)


def wna16_linear(x: Tensor, weight: PackedWeight, bias: Optional[Tensor]) -> Tensor:
    compute = float_accumulator(x.dtype)
    N, K = weight.out_features, weight.in_features
    scales, zeros = unpack_sz(weight.sz, weight.bits, x.dtype, N)
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    tiles = ROWS_AT_ONCE // TILE_N
    for start in range(0, weight.qweight.shape[0], tiles):
        n = slice(start * TILE_N, min((start + tiles) * TILE_N, N))
        ints = unpack_planes(weight.qweight[start : start + tiles], weight.bits, weight.tile_k, n.stop - n.start, K)
        dense = _dequantize(ints, scales[:, n].to(compute), zeros[:, n].to(compute), weight.perm, weight.group_size)
        y[:, n] = F.linear(x.to(compute), dense, None if bias is None else bias[n].to(compute)).to(x.dtype)
    return y


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
    dtype, compute = x.dtype, float_accumulator(x.dtype)
    x = x.to(compute)
    x_scale = x.abs().amax(dim=1, keepdim=True) / 127  # (M, 1)
    q = torch.where(x_scale > 0, x / x_scale, torch.zeros_like(x)).round()
    columns = [slice(start, start + EXACT_COLUMNS) for start in range(0, x.shape[1], EXACT_COLUMNS)]
    parts = [(q[:, part].float() @ qweight[:, part].float().t()).to(torch.int32) for part in columns]
    products = torch.stack(parts).sum(0, dtype=torch.int32)
    y = products.to(compute) * x_scale * scale.to(compute)
    return (y if bias is None else y + bias.to(compute)).to(dtype)
