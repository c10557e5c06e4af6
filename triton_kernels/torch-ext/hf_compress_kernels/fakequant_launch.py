"""Launchers of fake quantization."""

from typing import Tuple

import torch
import triton
from torch import Tensor

from .dispatch import INTERPRET
from .fakequant_kernels import fake_quant_grad_kernel, fake_quant_kernel

VALUES = 2048  # of one program and step


def _tiles(group_size: int) -> Tuple[int, int]:
    columns = min(VALUES, triton.next_power_of_2(group_size))
    return VALUES // columns, columns


def launch_fake_quant(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, group_size: int) -> Tensor:
    dtype = x.dtype
    x = x.contiguous()
    if INTERPRET:  # bfloat16 arithmetic is wrong there, and the cast to it truncates
        x, scale, zero = x.float(), scale.float(), zero.float()
    y = torch.empty_like(x)
    if x.numel():
        block_r, block_g = _tiles(group_size)
        fake_quant_kernel[(triton.cdiv(scale.numel(), block_r),)](
            x, scale.contiguous(), zero.contiguous(), y, scale.numel(), group_size, qmin, qmax, block_r, block_g
        )
    return y.to(dtype)


def launch_grad(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, group_size: int
) -> Tuple[Tensor, Tensor]:
    dtype, scale_dtype = x.dtype, scale.dtype
    grad, x = grad.contiguous(), x.contiguous()
    if INTERPRET:
        grad, x, scale, zero = grad.float(), x.float(), scale.float(), zero.float()
    grad_x = torch.empty_like(x)
    grad_scale = torch.zeros(scale.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        block_r, block_g = _tiles(group_size)
        fake_quant_grad_kernel[(triton.cdiv(scale.numel(), block_r),)](
            grad,
            x,
            scale.contiguous(),
            zero.contiguous(),
            grad_x,
            grad_scale,
            scale.numel(),
            group_size,
            qmin,
            qmax,
            block_r,
            block_g,
        )
    return grad_x.to(dtype), grad_scale.to(scale_dtype)
