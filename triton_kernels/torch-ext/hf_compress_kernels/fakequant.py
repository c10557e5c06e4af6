"""Fake quantization with a straight-through gradient for the weights and the learned-step gradient for the scale.

Esser et al., 2020 (LSQ), https://arxiv.org/abs/1902.08153, equations 1 to 3; with a zero point as in LSQ+.

    x_hat = s * (clamp(round(x / s) + z, qmin, qmax) - z)
    d x_hat / d x = 1 where nothing was clamped, else 0
    d x_hat / d s = round(x / s) - x / s where nothing was clamped, else qmin - z or qmax - z
"""

from typing import Tuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .dispatch import TRITON_DEVICES, check_same_device, float_accumulator, on_device, require_triton


@torch.library.custom_op(add_op_namespace_prefix("fake_quant"), mutates_args=())
def _fake_quant(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, group_size: int) -> Tensor:
    return _reference(x, scale, zero, qmin, qmax, group_size)


@_fake_quant.register_kernel(TRITON_DEVICES)
def _(x, scale, zero, qmin, qmax, group_size) -> Tensor:
    if x.dtype == torch.float64:
        return _reference(x, scale, zero, qmin, qmax, group_size)
    require_triton("fake_quant")
    from .fakequant_launch import launch_fake_quant

    with on_device(x):
        return launch_fake_quant(x, scale, zero, qmin, qmax, group_size)


def _reference(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, group_size: int) -> Tensor:
    groups, s, z = _in_groups(x, scale, zero, group_size)
    q = torch.clamp(torch.round(groups / s) + z, qmin, qmax)
    return (s * (q - z)).flatten(-2).to(x.dtype)


@_fake_quant.register_fake
def _(x, scale, zero, qmin, qmax, group_size) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(add_op_namespace_prefix("fake_quant_grad"), mutates_args=())
def _fake_quant_grad(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, group_size: int
) -> Tuple[Tensor, Tensor]:
    return _grad_reference(grad, x, scale, zero, qmin, qmax, group_size)


@_fake_quant_grad.register_kernel(TRITON_DEVICES)
def _(grad, x, scale, zero, qmin, qmax, group_size) -> Tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _grad_reference(grad, x, scale, zero, qmin, qmax, group_size)
    require_triton("fake_quant")
    from .fakequant_launch import launch_grad

    with on_device(grad):
        return launch_grad(grad, x, scale, zero, qmin, qmax, group_size)


def _grad_reference(grad, x, scale, zero, qmin, qmax, group_size) -> Tuple[Tensor, Tensor]:
    groups, s, z = _in_groups(x, scale, zero, group_size)
    grads = grad.unflatten(-1, (-1, group_size)).to(groups.dtype)
    steps = groups / s
    q = torch.round(steps) + z
    inside = (q >= qmin) & (q <= qmax)
    grad_scale = torch.where(inside, torch.round(steps) - steps, q.clamp(qmin, qmax) - z) * grads
    return (grads * inside).flatten(-2).to(x.dtype), grad_scale.sum(-1).to(scale.dtype)


@_fake_quant_grad.register_fake
def _(grad, x, scale, zero, qmin, qmax, group_size) -> Tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def _in_groups(x: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tuple[Tensor, Tensor, Tensor]:
    compute = float_accumulator(x.dtype)
    groups = x.unflatten(-1, (-1, group_size)).to(compute)  # (N, G, g)
    return groups, scale.to(compute)[..., None], zero.to(compute)[..., None]


def _save_for_backward(ctx, inputs, output) -> None:
    x, scale, zero, *ctx.sizes = inputs
    ctx.save_for_backward(x, scale, zero)


def _fake_quant_backward(ctx, grad: Tensor):
    x, scale, zero = ctx.saved_tensors
    grad_x, grad_scale = _fake_quant_grad(grad.contiguous(), x, scale, zero, *ctx.sizes)
    return grad_x, grad_scale, None, None, None, None


_fake_quant.register_autograd(_fake_quant_backward, setup_context=_save_for_backward)


def fake_quant(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, group_size: int = -1) -> Tensor:
    """Quantize and dequantize (N, K) in groups of `group_size` columns.

    x        (N, K)      floating point
    scale    (N, G)      positive, G = K / group_size; gradient as LSQ's, without its factor 1 / sqrt(n qmax)
    zero     (N, G)      integers, no gradient
    returns  (N, K)      dtype of x, computed in float32 (float64 for float64)
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point matrix (N, K), got {tuple(x.shape)} in {x.dtype}.")
    N, K = x.shape
    group_size = K if group_size == -1 else group_size
    if group_size < 1 or K % group_size:
        raise ValueError(f"group_size must divide the {K} columns of x, got {group_size}.")
    if scale.shape != (N, K // group_size) or zero.shape != scale.shape:
        raise ValueError(
            f"scale and zero must be {(N, K // group_size)}, got {tuple(scale.shape)} and {tuple(zero.shape)}."
        )
    if not qmin < qmax:
        raise ValueError(f"qmin must be less than qmax, got {qmin} and {qmax}.")
    check_same_device(x=x, scale=scale, zero=zero)
    return _fake_quant(x, scale, zero, qmin, qmax, group_size)
