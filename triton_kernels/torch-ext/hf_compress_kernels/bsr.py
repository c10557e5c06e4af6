"""Linear layers with a block-sparse weight: forward and both gradients."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .blocks import BlockSparseWeight, bsr_to_dense, gather_blocks
from .dispatch import TRITON_DEVICES, check_same_device, float_accumulator, on_device, require_triton


@torch.library.custom_op(add_op_namespace_prefix("bsr_linear"), mutates_args=())
def _bsr_linear(
    x: Tensor,
    bias: Optional[Tensor],
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    crow_t: Tensor,
    col_t: Tensor,
    perm_t: Tensor,
    out_features: int,
    in_features: int,
) -> Tensor:
    weight = BlockSparseWeight(values, crow, col, crow_t, col_t, perm_t, out_features, in_features)
    return _linear_reference(x, weight, bias)


@_bsr_linear.register_kernel(TRITON_DEVICES)
def _(x, bias, *sparse) -> Tensor:
    require_triton("bsr_linear")
    from .bsr_launch import launch_linear

    with on_device(x):
        return launch_linear(x, BlockSparseWeight(*sparse), bias)


def _linear_reference(x: Tensor, weight: BlockSparseWeight, bias: Optional[Tensor]) -> Tensor:
    compute = float_accumulator(x.dtype)
    bias = None if bias is None else bias.to(compute)
    return F.linear(x.to(compute), bsr_to_dense(weight).to(compute), bias).to(x.dtype)


@_bsr_linear.register_fake
def _(x, bias, *sparse) -> Tensor:
    return x.new_empty(x.shape[0], BlockSparseWeight(*sparse).out_features)


@torch.library.custom_op(add_op_namespace_prefix("bsr_linear_dx"), mutates_args=())
def _bsr_linear_dx(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    crow_t: Tensor,
    col_t: Tensor,
    perm_t: Tensor,
    out_features: int,
    in_features: int,
) -> Tensor:
    return _dx_reference(grad, BlockSparseWeight(values, crow, col, crow_t, col_t, perm_t, out_features, in_features))


@_bsr_linear_dx.register_kernel(TRITON_DEVICES)
def _(grad, *sparse) -> Tensor:
    require_triton("bsr_linear")
    from .bsr_launch import launch_dx

    with on_device(grad):
        return launch_dx(grad, BlockSparseWeight(*sparse))


def _dx_reference(grad: Tensor, weight: BlockSparseWeight) -> Tensor:
    compute = float_accumulator(grad.dtype)
    return (grad.to(compute) @ bsr_to_dense(weight).to(compute)).to(grad.dtype)


@_bsr_linear_dx.register_fake
def _(grad, *sparse) -> Tensor:
    return grad.new_empty(grad.shape[0], BlockSparseWeight(*sparse).in_features)


@torch.library.custom_op(add_op_namespace_prefix("bsr_linear_dw"), mutates_args=())
def _bsr_linear_dw(grad: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    return _dw_reference(grad, x, values, crow, col)


@_bsr_linear_dw.register_kernel(TRITON_DEVICES)
def _(grad, x, values, crow, col) -> Tensor:
    require_triton("bsr_linear")
    from .bsr_launch import launch_dw

    with on_device(grad):
        return launch_dw(grad, x, values, crow, col)


def _dw_reference(grad, x, values, crow, col) -> Tensor:
    compute = float_accumulator(x.dtype)
    num_blocks, *block_size = values.shape
    return gather_blocks(grad.to(compute).t() @ x.to(compute), crow, col, num_blocks, block_size).to(values.dtype)


@_bsr_linear_dw.register_fake
def _(grad, x, values, crow, col) -> Tensor:
    return torch.empty_like(values)


def _save_for_backward(ctx, inputs, output) -> None:
    x, _, *index, out_features, in_features = inputs
    ctx.save_for_backward(x, *index)
    ctx.sizes = (out_features, in_features)


def _linear_backward(ctx, grad: Tensor):
    x, values, *index = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_bias = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = _bsr_linear_dx(grad, values, *index, *ctx.sizes)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.sum(0)
    if ctx.needs_input_grad[2]:
        grad_values = _bsr_linear_dw(grad, x, values, *index[:2])
    return (grad_x, grad_bias, grad_values, *[None] * 7)


_bsr_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


def bsr_linear(x: Tensor, weight: BlockSparseWeight, bias: Optional[Tensor] = None) -> Tensor:
    """x W^T + bias for a block-sparse W; the cost follows the stored blocks.

    x        (..., K)   dtype of weight.values
    bias     (N,)       same dtype, or None
    returns  (..., N)   same dtype, accumulated in float32. A row of W without blocks gives the bias.

    Differentiable in x, weight.values and bias. Raises ValueError for a wrong dtype, device or size.
    """
    N, K = weight.out_features, weight.in_features
    if x.dtype != weight.values.dtype:
        raise ValueError(f"x and weight.values must share a dtype, got {x.dtype} and {weight.values.dtype}.")
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must end in in_features={K}, got shape {tuple(x.shape)}.")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be ({N},) in {x.dtype}, got {tuple(bias.shape)} in {bias.dtype}.")
    check_same_device(x=x, values=weight.values, crow=weight.crow, bias=bias)
    y = _bsr_linear(x.reshape(-1, K), bias, *weight)
    return y.reshape(*x.shape[:-1], N)
