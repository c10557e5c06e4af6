"""The inner loop of GPTQ: quantize a block of columns one by one, each error spread over the columns that follow.

Frantar et al., 2022, https://arxiv.org/abs/2210.17323, Algorithm 1. The lazy update of the columns after the block,
W[:, end:] -= err @ Hinv[block, end:], is the caller's matrix product.
"""

from typing import Tuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .dispatch import TRITON_DEVICES, check_same_device, on_device, require_triton


@torch.library.custom_op(add_op_namespace_prefix("gptq_quantize_block"), mutates_args=())
def _gptq_quantize_block(weight: Tensor, hinv: Tensor, scale: Tensor, zero: Tensor, maxq: int) -> Tuple[Tensor, Tensor]:
    W = weight.clone()  # (N, B)
    B = W.shape[1]
    q = torch.empty_like(W, dtype=torch.uint8)
    err = torch.empty_like(W)
    for i in range(B):
        s, z = (t[:, i * t.shape[1] // B] for t in (scale, zero))  # (N,)
        q_i = torch.clamp(torch.round(W[:, i] / s) + z, 0, maxq)
        err[:, i] = (W[:, i] - s * (q_i - z)) / hinv[i, i]
        W[:, i:] -= err[:, i, None] * hinv[i, i:]
        q[:, i] = q_i.to(torch.uint8)
    return q, err


@_gptq_quantize_block.register_kernel(TRITON_DEVICES)
def _(weight, hinv, scale, zero, maxq) -> Tuple[Tensor, Tensor]:
    require_triton("gptq_quantize_block")
    from .gptq_launch import launch_quantize_block

    with on_device(weight):
        return launch_quantize_block(weight, hinv, scale, zero, maxq)


@_gptq_quantize_block.register_fake
def _(weight, hinv, scale, zero, maxq) -> Tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)


def gptq_quantize_block(weight: Tensor, hinv: Tensor, scale: Tensor, zero: Tensor, maxq: int) -> Tuple[Tensor, Tensor]:
    """Quantize the columns of one block in order, compensating within the block.

    weight   (N, B)  float32 columns, already updated for all earlier blocks; unchanged
    hinv     (B, B)  float32, the block's part of the upper Cholesky factor of the inverse Hessian
    scale    (N, G)  float32, positive; G divides B, column i uses scale[:, i * G // B]
    zero     (N, G)  float32 zero points, integers
    maxq     2^bits - 1
    returns  q (N, B) uint8 with w ~ scale * (q - zero), and err (N, B) float32, the errors divided by the diagonal

    Rounds half to even. On a GPU, B is a power of two from 16 to 256.
    """
    if weight.ndim != 2 or hinv.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"hinv must be square over the columns of weight (N, B), got weight {tuple(weight.shape)} and hinv "
            f"{tuple(hinv.shape)}."
        )
    N, B = weight.shape
    if scale.shape != zero.shape or scale.ndim != 2 or scale.shape[0] != N or B % max(1, scale.shape[1]):
        raise ValueError(
            f"scale and zero must be ({N}, groups) with groups dividing {B}, got {tuple(scale.shape)} and "
            f"{tuple(zero.shape)}."
        )
    for name, tensor in (("weight", weight), ("hinv", hinv), ("scale", scale), ("zero", zero)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32, got {tensor.dtype}.")
    if not 1 <= maxq <= 255:
        raise ValueError(f"maxq must lie in [1, 255], got {maxq}.")
    check_same_device(weight=weight, hinv=hinv, scale=scale, zero=zero)
    return _gptq_quantize_block(weight, hinv, scale, zero, maxq)
