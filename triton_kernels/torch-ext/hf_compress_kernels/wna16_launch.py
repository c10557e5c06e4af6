"""Launchers of the low-bit kernels: choose a path and a tile, allocate, launch."""

import functools
import logging
import math
from typing import Dict, Optional, Tuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import tuning
from .dispatch import INTERPRET
from .magic import decoder
from .planes import TILE_N
from .tuning import TileConfig
from .wna16_kernels import wna16_dequant_kernel, wna16_linear_kernel

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 512 * 2**20  # most that a dequantized weight may take at once
GATHER_IN_KERNEL_UP_TO = 16  # rows of x; beyond, one index_select is cheaper than gathering in every program


def kernel_constants(bits: int, group_size: int, in_features: int, tile_k: int, dtype: torch.dtype, asm: bool) -> dict:
    """The compile-time arguments that follow from the weight and the dtype of x."""
    bf16 = dtype == torch.bfloat16
    whole_row = group_size >= in_features
    padded_k = -(-in_features // tile_k) * tile_k
    code = _decoder(bits, bf16) if asm else ("", "")
    return dict(
        BITS=bits,
        GROUP_SIZE=padded_k if whole_row else group_size,
        PIECE=tile_k if whole_row else math.gcd(group_size, tile_k),
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
    x: Tensor,
    qweight: Tensor,
    sz: Tensor,
    perm: Optional[Tensor],
    bias: Optional[Tensor],
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    tile_k: int,
    config: Optional[TileConfig] = None,
) -> Tensor:
    M = x.shape[0]
    if M == 0:
        return x.new_empty(0, out_features)
    device = tuning.device_for(x)
    weight = (qweight, sz, perm, bits, group_size, out_features, in_features, tile_k)
    if config is None:
        if M >= tuning.dequant_from(device):
            return _multiply_dequantized(x, bias, *weight)
        config = tuning.linear_config(device, bits, group_size, M, out_features, in_features)
    if perm is not None and M > GATHER_IN_KERNEL_UP_TO:
        x, perm = x.index_select(1, perm), None
    elif x.stride(1) != 1:
        x = x.contiguous()
    try:
        return _launch(x, bias, qweight, sz, perm, *weight[3:], config)
    except OutOfResources as error:
        logger.warning("wna16_linear %s on %s: %s. Using %s.", config, device.arch, error, tuning.CONSERVATIVE)
        return _launch(x, bias, qweight, sz, perm, *weight[3:], tuning.CONSERVATIVE)


def _launch(x, bias, qweight, sz, perm, bits, group_size, N, K, tile_k, config: TileConfig) -> Tensor:
    M = x.shape[0]
    device = tuning.device_for(x)
    dtype = x.dtype
    if INTERPRET:  # bfloat16 arithmetic is wrong there, and the cast to it truncates: torch rounds the result
        x, bias = x.float(), None if bias is None else bias.float()
    num_kt = triton.cdiv(K, tile_k)
    split = tuning.split_k(config, device, M, N, num_kt)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if split > 1:
        partial = torch.empty(split * tiles * config.block_m * config.block_n, dtype=torch.float32, device=x.device)
        ticket = _tickets(x.device, tiles)
    else:
        partial = ticket = y
    wna16_linear_kernel[(tiles, split)](
        x,
        qweight,
        sz,
        qweight if perm is None else perm,
        y if bias is None else bias,
        y,
        partial,
        ticket,
        M,
        N,
        K,
        x.stride(0) if M > 1 else K,
        N,
        **kernel_constants(bits, group_size, K, tile_k, dtype, device.uses_asm),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPLIT_K=split,
        HAS_PERM=perm is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=K % tile_k == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y.to(dtype)


_ticket_buffers: Dict[tuple, Tensor] = {}


def _tickets(device: torch.device, tiles: int) -> Tensor:
    """At least `tiles` zeros. Kernels leave them zero, so one buffer serves all launches of a stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside other streams: it gets tickets of its own, zeroed by its own node.
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    buffer = _ticket_buffers.get(key)
    if buffer is None or buffer.numel() < tiles:
        buffer = _ticket_buffers[key] = torch.zeros(max(4096, tiles), dtype=torch.int32, device=device)
    return buffer


def launch_dequant(
    qweight: Tensor,
    sz: Tensor,
    perm: Optional[Tensor],
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    tile_k: int,
    dtype: torch.dtype,
    rows: Optional[Tuple[int, int]] = None,
) -> Tensor:
    """The weight in full, or its `rows` (start, stop), both multiples of 64 or the end."""
    start, stop = rows or (0, out_features)
    use_asm = tuning.device_for(qweight).uses_asm
    weight = torch.empty(stop - start, in_features, dtype=torch.float32 if INTERPRET else dtype, device=qweight.device)
    grid = (triton.cdiv(stop - start, TILE_N), triton.cdiv(in_features, tile_k))
    wna16_dequant_kernel[grid](
        qweight,
        sz,
        qweight if perm is None else perm,
        weight,
        out_features,
        in_features,
        start // TILE_N,
        **kernel_constants(bits, group_size, in_features, tile_k, dtype, use_asm),
        HAS_PERM=perm is not None,
        num_warps=4,
    )
    return weight.to(dtype)


def _multiply_dequantized(x: Tensor, bias: Optional[Tensor], *weight) -> Tensor:
    """Dequantize into scratch and call the vendor's product, by slabs of rows when the scratch would be large."""
    qweight, sz, perm, bits, group_size, N, K, tile_k = weight
    slab = max(TILE_N, SCRATCH_BYTES // (2 * K) // TILE_N * TILE_N)
    y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
    for start in range(0, N, slab):
        rows = (start, min(start + slab, N))
        dense = launch_dequant(*weight, x.dtype, rows)
        part = None if bias is None else bias[slice(*rows)]
        y[:, slice(*rows)] = torch.nn.functional.linear(x, dense, part)
    return y
