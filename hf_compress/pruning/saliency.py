"""Optimal brain damage and surgery, one linear map at a time, from the second moments of its inputs.

LeCun et al. 1989 (damage), Hassibi & Stork 1992 (surgery); column by column: Frantar & Alistarh 2023 (SparseGPT),
https://arxiv.org/abs/2301.00774. The loss is that of the map's outputs, |W X - W' X|^2 / n, whose Hessian is the same
for every row of W: H = 2 X X^T / n.
"""

import torch
from torch import Tensor

from hf_compress.pruning.selection import keep_largest

DAMP_PERCENT = 0.01  # share of the mean Hessian diagonal added to it, as in the paper's experiments
COLUMNS = 128  # decided on and updated together, as in the paper's code


def damage_saliency(weight: Tensor, hessian: Tensor) -> Tensor:
    """(N, K): h_ii w_i^2 / 2, how much the loss rises without a weight, all others left as they are."""
    return hessian.diagonal() * weight**2 / 2


def surgery(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    *,
    bank_size: int | None = None,
    damp_percent: float = DAMP_PERCENT,
    num_columns: int = COLUMNS,
) -> Tensor:
    """A new (N, K) weight without a share `sparsity` of its weights, the others adjusted to make up for them.

    Columns are visited in order; each weight that goes changes the columns after it by -w_i / [H^-1]_ii * [H^-1]_i:,
    with H that of the columns not yet visited. Which weights go is decided for `num_columns` columns together, or for
    each bank of `bank_size` in each row (N:M), by w_i^2 / [H^-1]_ii: how much the loss
    rises without it. Computed in the dtype of `hessian`. Inputs that
    were always zero lose their weights.
    """
    W, H = weight.to(hessian.dtype).clone(), hessian.clone()  # (N, K), (K, K)
    dead = H.diagonal() == 0
    W[:, dead] = 0
    H.diagonal()[dead] = 1
    H.diagonal().add_(damp_percent * H.diagonal().mean())
    # row i of the Cholesky factor is row i of the inverse Hessian of columns i.., over the root of its diagonal
    R = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)  # (K, K)
    step = num_columns if bank_size is None else bank_size
    for first in range(0, W.shape[1], step):
        last = min(first + step, W.shape[1])
        saliency = W[:, first:last] ** 2 / R.diagonal()[first:last] ** 2
        scope = "class-uniform" if bank_size is None else "row"
        (keep,) = keep_largest([saliency], sparsity, scope=scope)  # (N, last - first)
        errors = torch.zeros_like(saliency)
        for i in range(first, last):
            error = W[:, i].masked_fill(keep[:, i - first], 0) / R[i, i]  # (N,)
            W[:, i:last] -= error[:, None] * R[i, i:last]
            W[:, i].masked_fill_(~keep[:, i - first], 0)
            errors[:, i - first] = error
        W[:, last:] -= errors @ R[first:last, last:]
    return W.to(weight.dtype)
