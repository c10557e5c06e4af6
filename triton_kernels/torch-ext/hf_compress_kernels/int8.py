"""A linear layer of 8-bit integers that quantizes its input per token."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix
from .dispatch import check_same_device


def quantize_tokens(x: Tensor) -> "tuple[Tensor, Tensor]":
    """Rows of x (M, K) as int8 in [-127, 127] and their float32 scales (M, 1); a row of zeros has scale 0."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scale > 0, x / scale, torch.zeros_like(x)).round().to(torch.int8), scale


@torch.library.custom_op(add_op_namespace_prefix("w8a8_linear"), mutates_args=())
def _w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
    return reference.w8a8_linear(x, qweight, scale, bias)


@_w8a8_linear.register_kernel("cuda")
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
    q, x_scale = quantize_tokens(x)
    M, K = q.shape
    N = qweight.shape[0]
    # torch._int_mm (cuBLAS) wants more than 16 rows and multiples of 8.
    rows = max(32, M + -M % 8)
    padded = F.pad(q, (0, -K % 8, 0, rows - M))
    products = torch._int_mm(padded, F.pad(qweight, (0, -K % 8, 0, -N % 8)).t())[:M, :N]  # int32
    y = products.float() * x_scale * scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@_w8a8_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Optional[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], qweight.shape[0])


def w8a8_linear(x: Tensor, qweight: Tensor, scale: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x W^T + bias with both sides in 8 bit: x is quantized on the fly, symmetrically, one scale per token.

    x        (..., K)  floating point
    qweight  (N, K)    int8, symmetric
    scale    (N,)      floating point
    returns  (..., N)  dtype of x, products summed exactly in int32. Not differentiable.
    """
    if qweight.ndim != 2 or qweight.dtype != torch.int8:
        raise ValueError(f"qweight must be an int8 matrix, got {tuple(qweight.shape)} in {qweight.dtype}.")
    N, K = qweight.shape
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be floating point and end in in_features={K}, got {tuple(x.shape)} in {x.dtype}.")
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != (N,):
            raise ValueError(f"{name} must be ({N},), got {tuple(tensor.shape)}.")
    check_same_device(x=x, qweight=qweight, scale=scale, bias=bias)
    return _w8a8_linear(x.reshape(-1, K), qweight, scale, bias).reshape(*x.shape[:-1], N)
