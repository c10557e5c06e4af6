"""Activations of 8 bits: rounded to a calibrated range, or to each token's own. Gradients pass straight through."""

import torch
from torch import Tensor

from hf_compress.engines.rounding import LARGEST_INT8, LEVELS, grid_of_range


def round_to_range(x: Tensor, low: float, high: float) -> Tensor:
    """x on the 8-bit grid of a calibrated range, what lies outside clipped; there the gradient is zero."""
    return round_to_grid(x, *grid_of_range(low, high))


def round_to_grid(x: Tensor, scale: float, zero_point: float) -> Tensor:
    steps = (x.detach().float() / scale).round_()  # before the zero point is added: in float32 that moves halves
    q = steps.clamp(-zero_point, LEVELS - zero_point)
    rounded = (q * scale).to(x.dtype)
    return _StraightThrough.apply(x, rounded, q == steps) if needs_gradient(x) else rounded


def round_per_token(x: Tensor) -> Tensor:
    """x (..., K) with each token on the symmetric 8-bit grid of its own largest value."""
    scale = x.detach().abs().amax(-1, keepdim=True).float() / LARGEST_INT8
    q = torch.where(scale > 0, x.detach() / scale, 0.0).round()
    rounded = (q * scale).to(x.dtype)
    return _StraightThrough.apply(x, rounded, None) if needs_gradient(x) else rounded


def needs_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


class _StraightThrough(torch.autograd.Function):
    """`rounded` in the forward pass; the gradient of x as it comes, or zero outside of `inside`."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inside,) = ctx.saved_tensors
        return grad if inside is None else grad * inside, None, None
