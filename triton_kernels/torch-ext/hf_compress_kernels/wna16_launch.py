"""Launchers of the low-bit kernels: choose a path and a tile, allocate, launch."""

import functools
import math
from typing import Optional, Tuple

import torch
import triton
from torch import Tensor

from . import reference, tuning
from .dispatch import INTERPRET
from .fallback import first_that_fits
from .magic import decoder
from .planes import TILE_N, PackedWeight
from .tuning import TileConfig
from .wna16_kernels import wna16_dequant_kernel, wna16_linear_kernel

SCRATCH_BYTES = 512 * 2**20  # most that a dequantized weight may take at once
GATHER_IN_KERNEL_UP_TO = 16  # rows of x; beyond, one index_select is cheaper than gathering in every program


def kernel_constants(weight: PackedWeight, asm: bool) -> dict:
    """The compile-time arguments that follow from the weight; only its sizes and dtype are looked at."""
    bits, tile_k, K = weight.bits, weight.tile_k, weight.in_features
    bf16 = weight.dtype == torch.bfloat16
    whole_row = weight.group_size >= K
    code = _decoder(bits, bf16) if asm else ("", "")
    return dict(
        BITS=bits,
        GROUP_SIZE=triton.cdiv(K, tile_k) * tile_k if whole_row else weight.group_size,
        PIECE=tile_k if whole_row else math.gcd(weight.group_size, tile_k),
        TILE_K=tile_k,
        BF16=bf16,
        USE_ASM=asm,
        UPCAST=INTERPRET,
        ASM=code[0],
        OPERANDS=code[1],
    )


@functools.lru_cache(None)
def _decoder(bits: int, bf16: bool) -> Tuple[str, str]:
    asm, constraints, _ = decoder(bits, bf16)
    return asm, constraints


def launch_linear(
    x: Tensor, weight: PackedWeight, bias: Optional[Tensor], config: Optional[TileConfig] = None
) -> Tensor:
    M = x.shape[0]
    if M == 0:
        return x.new_empty(0, weight.out_features)
    device = tuning.device_for(x)
    if config is None:
        if M >= tuning.dequant_from(device):
            return _multiply_dequantized(x, weight, bias)
        sizes = (weight.bits, weight.group_size, M, weight.out_features, weight.in_features)
        config = tuning.linear_config(device, *sizes)
    if weight.perm is not None and M > GATHER_IN_KERNEL_UP_TO:
        x, weight = x.index_select(1, weight.perm), weight._replace(perm=None)
    elif x.stride(1) != 1:
        x = x.contiguous()
    what = ("wna16_linear", *weight[4:], tuning.bucket(M), device.name)
    y = first_that_fits(what, [config, *tuning.SMALLER], lambda smaller: _launch(x, weight, bias, smaller))
    return reference.wna16_linear(x, weight, bias) if y is None else y


def _launch(x: Tensor, weight: PackedWeight, bias: Optional[Tensor], config: TileConfig) -> Tensor:
    M, N, K = x.shape[0], weight.out_features, weight.in_features
    perm, dtype = weight.perm, x.dtype
    device = tuning.device_for(x)
    if INTERPRET:  # bfloat16 arithmetic is wrong there, and the cast to it truncates: torch rounds the result
        x, bias = x.float(), None if bias is None else bias.float()
    split = tuning.split_k(config, device, M, N, triton.cdiv(K, weight.tile_k))
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if weight.tickets is None or tiles > weight.tickets.shape[1]:
        split = 1
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if split > 1:
        partial = torch.empty(split * tiles * config.block_m * config.block_n, dtype=torch.float32, device=x.device)
        ticket = _tickets(weight)
    else:
        partial = ticket = y
    wna16_linear_kernel[(tiles, split)](
        x,
        weight.qweight,
        weight.sz,
        weight.qweight if perm is None else perm,
        y if bias is None else bias.contiguous(),
        y,
        partial,
        ticket,
        M,
        N,
        K,
        x.stride(0) if M > 1 else K,
        N,
        **kernel_constants(weight, device.uses_asm),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT_K=split,
        HAS_PERM=perm is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=K % weight.tile_k == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y.to(dtype)


def _tickets(weight: PackedWeight) -> Tensor:
    """Zeros that no launch beside this one holds. The kernel leaves them zero.

    The weight's own serve its launches on the default stream, which follow each other, and those in graphs: as with
    other memory of graphs, two that hold the same weight must not be replayed at once. On any other stream, which may
    run beside the default one, a launch has its own.
    """
    tickets = weight.tickets
    if tickets.is_cuda and torch.cuda.is_current_stream_capturing():
        return tickets[1]
    if tickets.is_cuda and torch.cuda.current_stream(tickets.device) != torch.cuda.default_stream(tickets.device):
        return torch.zeros_like(tickets[0])
    return tickets[0]


def launch_dequant(weight: PackedWeight, rows: Optional[Tuple[int, int]] = None) -> Tensor:
    """The weight in full, or its `rows` (start, stop), both multiples of 64 or the end."""
    N, K = weight.out_features, weight.in_features
    start, stop = rows or (0, N)
    device = weight.qweight.device
    dense = torch.empty(stop - start, K, dtype=torch.float32 if INTERPRET else weight.dtype, device=device)
    wna16_dequant_kernel[(triton.cdiv(stop - start, TILE_N), triton.cdiv(K, weight.tile_k))](
        weight.qweight,
        weight.sz,
        weight.qweight if weight.perm is None else weight.perm,
        dense,
        N,
        K,
        start // TILE_N,
        **kernel_constants(weight, tuning.device_for(weight.qweight).uses_asm),
        HAS_PERM=weight.perm is not None,
        num_warps=4,
    )
    return dense.to(weight.dtype)


def _multiply_dequantized(x: Tensor, weight: PackedWeight, bias: Optional[Tensor]) -> Tensor:
    """Dequantize into scratch and call the vendor's product, by slabs of rows when the scratch would be large."""
    N, K = weight.out_features, weight.in_features
    slab = max(TILE_N, SCRATCH_BYTES // (2 * K) // TILE_N * TILE_N)
    if slab >= N:
        return torch.nn.functional.linear(x, launch_dequant(weight), bias)
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    for start in range(0, N, slab):
        rows = slice(start, min(start + slab, N))
        dense = launch_dequant(weight, (rows.start, rows.stop))
        y[:, rows] = torch.nn.functional.linear(x, dense, None if bias is None else bias[rows])
    return y
