"""Launchers of the block-sparse kernels, and the density from which a dense product is faster."""

from typing import Optional

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import tuning
from .blocks import BlockSparseWeight, block_density, block_rows, bsr_to_dense, gather_blocks
from .bsr_kernels import bsr_dw_kernel, bsr_linear_kernel
from .dispatch import INTERPRET
from .fallback import first_that_fits
from .tuning import TileConfig

GROUP_M = 8


def _runs_dense(dtype: torch.dtype, values: Tensor, out_features: int, in_features: int) -> bool:
    """Whether dense is faster, or the kernels do not know the dtype."""
    if INTERPRET:
        return False
    density = block_density(values, out_features, in_features)
    side = min(values.shape[1:])
    return dtype == torch.float64 or density > tuning.bsr_break_even(tuning.device_for(values), side)


def launch_linear(x: Tensor, weight: BlockSparseWeight, bias: Optional[Tensor]) -> Tensor:
    if _runs_dense(x.dtype, weight.values, weight.out_features, weight.in_features):
        return F.linear(x, bsr_to_dense(weight), bias)
    y = _launch(x, weight.values, weight.crow, weight.col, None, bias, weight.out_features)
    return F.linear(x, bsr_to_dense(weight), bias) if y is None else y


def launch_dx(grad: Tensor, weight: BlockSparseWeight) -> Tensor:
    if _runs_dense(grad.dtype, weight.values, weight.out_features, weight.in_features):
        return grad @ bsr_to_dense(weight)
    dx = _launch(grad, weight.values, weight.crow_t, weight.col_t, weight.perm_t, None, weight.in_features)
    return grad @ bsr_to_dense(weight) if dx is None else dx


def _launch(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, perm: Optional[Tensor], bias: Optional[Tensor], N: int
) -> Optional[Tensor]:
    """None where no tile fits the device."""
    M, K = x.shape
    num_blocks = values.shape[0]
    if M == 0 or num_blocks == 0:
        y = x.new_zeros(M, N)
        return y if bias is None else y + bias
    OUT, IN = values.shape[1:] if perm is None else values.shape[:0:-1]
    device = tuning.device_for(x)
    config = tuning.bsr_rule(device, M, OUT, IN)
    if x.stride(1) != 1:
        x = x.contiguous()
    what = ("bsr_linear", x.dtype, OUT, IN, perm is not None, config, device.name)
    return first_that_fits(what, tuning.bsr_smaller(config),
                           lambda smaller: _launch_tiles(x, values, crow, col, perm, bias, N, smaller))  # fmt: skip


def _launch_tiles(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, perm: Optional[Tensor], bias: Optional[Tensor], N: int,
    config: TileConfig,
) -> Tensor:  # fmt: skip
    M, K = x.shape
    num_blocks = values.shape[0]
    OUT, IN = values.shape[1:] if perm is None else values.shape[:0:-1]
    dtype = x.dtype
    if INTERPRET:  # bfloat16 arithmetic is wrong there, and the cast to it truncates: torch rounds the result
        x, values, bias = x.float(), values.float(), None if bias is None else bias.float()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    rows = crow.numel() - 1
    bsr_linear_kernel[(rows * triton.cdiv(M, config.block_m),)](
        x,
        values.contiguous(),
        crow,
        col,
        col if perm is None else perm,
        y if bias is None else bias.contiguous(),
        y,
        M,
        K,
        N,
        rows,
        num_blocks,
        x.stride(0) if M > 1 else K,
        N,
        BLOCK_M=config.block_m,
        IN=IN,
        OUT=OUT,
        TRANSPOSED=perm is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=K % IN == 0,
        UPCAST=INTERPRET,
        PRECISION=_precision(dtype),
        GROUP_M=GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y.to(dtype)


def launch_dw(grad: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    num_blocks, BN, BK = values.shape
    (M, K), N = x.shape, grad.shape[1]
    if M == 0 or num_blocks == 0:
        return torch.zeros_like(values)
    device, dense = tuning.device_for(x), lambda: gather_blocks(grad.t() @ x, crow, col, num_blocks, (BN, BK))
    if _runs_dense(x.dtype, values, N, K):
        return dense()
    config = tuning.bsr_rule(device, M, BN, BK)._replace(block_m=tuning.BSR_DW_ROWS, num_stages=3)
    what = ("bsr_linear, gradient of its blocks", x.dtype, BN, BK, device.name)
    out = first_that_fits(what, tuning.bsr_smaller(config),
                          lambda smaller: _launch_dw(grad, x, values, crow, col, smaller))  # fmt: skip
    return dense() if out is None else out


def _launch_dw(grad: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, config: TileConfig) -> Tensor:
    num_blocks, BN, BK = values.shape
    (M, K), N = x.shape, grad.shape[1]
    grad = grad.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    if INTERPRET:
        grad, x = grad.float(), x.float()
    out = torch.empty(values.shape, dtype=x.dtype, device=x.device)
    bsr_dw_kernel[(num_blocks,)](
        grad,
        x,
        block_rows(crow, num_blocks).int(),
        col,
        out,
        M,
        N,
        K,
        N,
        x.stride(0) if M > 1 else K,
        BLOCK_M=config.block_m,
        BN=BN,
        BK=BK,
        EVEN=N % BN == 0 and K % BK == 0,
        UPCAST=INTERPRET,
        PRECISION=_precision(values.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out.to(values.dtype)


def _precision(dtype: torch.dtype) -> str:
    """float32 products stay float32, as torch's do unless told otherwise."""
    return "ieee" if dtype == torch.float32 else "tf32"
