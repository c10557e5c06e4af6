"""Which blocks stay: pure functions from scores to masks. A block may be a single weight, a neuron or a head."""

from collections.abc import Sequence

import torch
from torch import Tensor

SCOPES = ("class-blind", "class-uniform", "class-distribution", "row", "bank")


def keep_largest(
    scores: Sequence[Tensor], sparsity: float, *, scope: str = "class-blind", bank_size: int | None = None
) -> list[Tensor]:
    """True for the blocks that stay, when a share `sparsity` of those with the lowest scores goes.

    scores     one tensor (rows, columns) for each matrix
    scope      what the share is a share of (the first three as See et al. 2016, https://arxiv.org/abs/1606.09274):
               class-blind: all matrices together; class-uniform: each matrix; row: each row of each matrix (Wanda);
               bank: each run of `bank_size` blocks of a row (bank-balanced, Cao et al. 2019,
               https://doi.org/10.1145/3289602.3293898; N:M is banks of M, a share 1 - N/M of which goes);
               class-distribution: all together, with scores in units of their matrix's standard deviation, which is
               the caller's to divide by, since it is that of the weights
    returns    boolean tensors, shaped as the scores. The number that goes is rounded down; of equals the first go.
    """
    if scope in ("class-blind", "class-distribution"):
        flat = torch.cat([score.flatten() for score in scores])
        kept = _keep(flat[None], sparsity)[0].split([score.numel() for score in scores])
        return [mask.view_as(score) for mask, score in zip(kept, scores, strict=True)]
    if scope == "class-uniform":
        return [_keep(score.reshape(1, -1), sparsity).view_as(score) for score in scores]
    if scope == "row":
        return [_keep(score, sparsity) for score in scores]
    return [_keep(score.reshape(-1, bank_size), sparsity).view_as(score) for score in scores]


def grow_steepest(
    masks: Sequence[Tensor], slopes: Sequence[Tensor], share: float, *, scope: str, bank_size: int | None = None
) -> list[Tensor]:
    """`masks`, and True too for a `share` of all blocks: of those held back the ones with the largest |dL/dw|.

    Dai et al. 2017, https://arxiv.org/abs/1711.02017, section 3.1. `slopes` are shaped as the masks; `scope` says what
    the share is a share of.
    """
    held_back = [slope.abs().masked_fill(mask, -1.0) for slope, mask in zip(slopes, masks, strict=True)]
    steepest = keep_largest(held_back, 1 - share, scope=scope, bank_size=bank_size)
    return [mask | new for mask, new in zip(masks, steepest, strict=True)]


def keep_above(scores: Sequence[Tensor], thresholds: Sequence[Tensor | float]) -> list[Tensor]:
    """True where a score reaches its matrix's threshold, and for the highest of each: no matrix goes as a whole."""
    return [score >= min(threshold, score.max()) for score, threshold in zip(scores, thresholds, strict=True)]


def _keep(rows: Tensor, sparsity: float) -> Tensor:
    """(R, n) -> (R, n): False for the lowest int(sparsity * n) of each row."""
    number = int(sparsity * rows.shape[1] + 1e-6)  # 0.7 * 10 is below 7 in floating point
    if number == 0:
        return torch.ones_like(rows, dtype=torch.bool)
    if len(rows) > 1:
        order = rows.argsort(dim=1, stable=True)
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, order[:, :number], False)
    row = rows[0]  # one long row: finding the threshold is much faster than sorting
    threshold = row.kthvalue(number).values
    gone = row < threshold
    ties = (row == threshold).nonzero()[: number - int(gone.sum()), 0]
    gone[ties] = True
    return ~gone[None]
