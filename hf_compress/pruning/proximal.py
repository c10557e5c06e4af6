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


def shrink_rows(rows: Tensor, strength: float) -> Tensor:
    """The proximal step of strength * sum_i ||row_i||_2 for rows (R, n): all of a row shrinks alike.

    The penalty of neurons of Murray & Chiang 2015, https://arxiv.org/abs/1508.05051, first of two; their L2.
    """
    return rows * group_lasso_factors(rows.square().sum(-1, keepdim=True), strength)


def shrink_largest(rows: Tensor, strength: float) -> Tensor:
    """The proximal step of strength * sum_i max_j |row_ij| for rows (R, n): the largest of a row are cut to one height.

    The second penalty there, L-infinity. By Moreau's decomposition it is a row minus its projection onto the L1 ball
    of radius `strength` (Duchi et al. 2008, https://doi.org/10.1145/1390156.1390191): the height is where the parts
    above it sum to `strength`, and a row whose L1 norm is below that becomes zero.
    """
    ordered = rows.abs().sort(dim=-1, descending=True).values
    counts = torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device)
    heights = (ordered.cumsum(-1) - strength) / counts  # (R, n): if the largest j are cut
    number = (ordered > heights).sum(-1, keepdim=True).clamp(min=1)
    height = heights.gather(-1, number - 1).clamp(min=0)
    return rows.sign() * torch.minimum(rows.abs(), height)


ROW_PENALTIES = {"l2": shrink_rows, "max": shrink_largest}
