"""8-bit integer operators: a linear layer that quantizes its input per token, and an embedding packed along the row."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix
from .dispatch import check_same_device
from .packing import check_bits, words_per_row


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


# One body for every device: it gathers a few rows and unpacks only those.
@torch.library.custom_op(add_op_namespace_prefix("packed_embedding"), mutates_args=())
def _packed_embedding(ids: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int) -> Tensor:
    return reference.packed_embedding(ids, qweight, scale, zero, bits, dim)


@_packed_embedding.register_fake
def _(ids: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int) -> Tensor:
    return scale.new_empty(*ids.shape, dim)


def packed_embedding(ids: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor, bits: int, dim: int) -> Tensor:
    """Rows of a table whose values are packed along the row, see `pack_rows`: scale * (q - zero).

    ids      (...)                      int32 or int64 in [0, V)
    qweight  (V, ceil(dim * bits / 32)) int32
    scale    (V, G)                     floating point; G divides dim
    zero     (V, G)                     integers or floating point
    returns  (..., dim)                 dtype of scale
    """
    check_bits(bits)
    if qweight.dtype != torch.int32 or qweight.ndim != 2 or qweight.shape[1] != words_per_row(dim, bits):
        raise ValueError(
            f"qweight must be int32 (rows, {words_per_row(dim, bits)}) for dim={dim} at {bits} bits, "
            f"got {tuple(qweight.shape)} in {qweight.dtype}."
        )
    if scale.ndim != 2 or scale.shape != zero.shape or scale.shape[0] != qweight.shape[0] or dim % scale.shape[1]:
        raise ValueError(
            f"scale and zero must be ({qweight.shape[0]}, groups) with groups dividing dim={dim}, "
            f"got {tuple(scale.shape)} and {tuple(zero.shape)}."
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}.")
    check_same_device(ids=ids, qweight=qweight, scale=scale, zero=zero)
    return _packed_embedding(ids, qweight, scale, zero, bits, dim)
