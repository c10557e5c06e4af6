"""Proximal steps: what a penalty does to the weights in an optimizer step of its own, after that of the loss.

Unlike a penalty in the loss they reach exact zeros, need no gradient, and leave Adam's averages alone.
"""

import torch
from torch import Tensor

EPSILON = 1e-3  # of Guo et al.'s weights 1 / (|w| + epsilon), so that small weights do not divide by nothing


@torch.no_grad()
def soft_threshold_(weight: Tensor, threshold: Tensor | float) -> None:
    """argmin over x of (x - w)^2 / 2 + threshold * |x|, in place: sign(w) max(|w| - threshold, 0)."""
    weight.copy_(torch.sign(weight) * (weight.abs() - threshold).clamp(min=0))


def reweighted_threshold(weight: Tensor, strength: float) -> Tensor:
    """Thresholds of reweighted proximal pruning: strength * alpha, with alpha = 1 / (|w| + epsilon).

    `weight` is as it was before the optimizer's step, to whose result the thresholds apply (algorithm 1 of Guo et al.
    2019, https://arxiv.org/abs/1909.12486). `strength` is the learning rate times gamma of the penalty
    gamma * sum alpha |w|; small weights are pushed down harder than large ones.
    """
    return strength / (weight.abs() + EPSILON)


def group_lasso_factors(squared_norms: Tensor, strength: float) -> Tensor:
    """What each block is multiplied by: max(0, 1 - strength / norm), the proximal step of strength * sum ||block||_2.

    The penalty is that of Narang et al. 2017, https://arxiv.org/abs/1711.02782; `strength` is the learning rate times
    lambda_g. A block whose norm is below `strength` becomes zero.
    """
    norms = squared_norms.sqrt()
    return (1 - strength / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
