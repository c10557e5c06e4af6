"""Activations of 8 bits: rounded to a calibrated range, or to each token's own."""

import torch
from torch import Tensor

LEVELS = 255  # steps of an 8-bit grid
LARGEST_INT8 = 127  # per token the grid is symmetric, as int8 products want it


def activation_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the 8-bit grid over [low, high], which holds zero; scalars, float32."""
    scale = (high - low) / LEVELS
    return scale, (-low / scale).round()


def round_to_range(x: Tensor, low: float, high: float) -> Tensor:
    """x on the 8-bit grid of a calibrated range, what lies outside clipped."""
    limits = torch.tensor([low, high], dtype=torch.float32, device=x.device)
    scale, zero_point = activation_grid(limits[0], limits[1])
    q = (x.float() / scale + zero_point).round().clamp(0, LEVELS)
    return ((q - zero_point) * scale).to(x.dtype)


def round_per_token(x: Tensor) -> Tensor:
    """x (..., K) with each token on the symmetric 8-bit grid of its own largest value."""
    scale = x.abs().amax(-1, keepdim=True).float() / LARGEST_INT8
    q = torch.where(scale > 0, x / scale, 0.0).round()
    return (q * scale).to(x.dtype)
