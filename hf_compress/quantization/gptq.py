"""GPTQ: round a weight column by column and let the columns still to come make up for the error.

Frantar et al., 2023, https://arxiv.org/abs/2210.17323

    H = 2 X X^T + damping,  U = upper Cholesky factor of H^-1            (algorithm 1)
    for each column j:  q_j = round(w_j);  w_k -= (w_j - q_j) / U_jj * U_jk  for k > j

The squared error of the layer's outputs is the sum over columns of ((w_j - q_j) / U_jj)^2, so 1 / U_jj^2 also weighs
the columns when the range of a group is searched.
"""

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from hf_compress.engines.ops import gptq_quantize_block
from hf_compress.quantization.grids import (
    QuantizedWeight,
    check_weight,
    dequantize_from_grid,
    find_grid,
    group_rows,
    quantize_to_grid,
    round_scale,
)

logger = logging.getLogger(__name__)

DAMP_PERCENT = 0.01  # share of the mean Hessian diagonal added to it, as in the paper's experiments
DAMP_GROWTH = 10.0  # a Hessian that stays singular is damped this many times more,
LARGEST_DAMP = 1.0  # until the damping is as large as the mean diagonal
UPDATE_BLOCK_SIZE = 64  # columns quantized before the rest of the matrix is updated (section 3.3, step 2)
HAS_TRITON = find_spec("triton") is not None
KERNEL_RUNS = 16, 32, 64, 128, 256  # columns that the kernel takes


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    group_size: int = -1,
    symmetric: bool = False,
    range_method: str = "mse",
    desc_act: bool = False,
    static_groups: bool = False,
    damp_percent: float = DAMP_PERCENT,
    update_block_size: int = UPDATE_BLOCK_SIZE,
    refinements: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    name: str = "the weight",
    num_samples: int | None = None,
) -> QuantizedWeight:
    """Quantize a linear weight so that its outputs over the calibration inputs change least.

    weight   (N, K)  float; float64 is computed in float64, everything else in float32
    hessian  (K, K)  2 X X^T of the layer's inputs, or any multiple of it
    returns  integers in [0, 2^bits - 1] with one scale and zero point for each row and group of columns

    desc_act       visit the columns by falling Hessian diagonal; groups then hold columns of like importance
    static_groups  with desc_act: groups stay runs of neighbouring columns, their ranges taken before the first update
    refinements    rounds of `refit_scales` followed by one sweep of coordinate descent, each of which lowers the error

    Raises ValueError, naming `name`, for weights or Hessians that are not finite, and for a Hessian that no damping
    makes positive definite.
    """
    _check(weight, hessian, name)
    N, K = weight.shape
    group_size = K if group_size == -1 else group_size
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    H = hessian.to(dtype)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if desc_act else torch.arange(K, device=H.device)
    U = inverse_cholesky(H[order][:, order], damp_percent, name=name, num_samples=num_samples).to(dtype)
    W = weight.to(dtype)[:, order]  # (N, K), in the order of quantization
    is_static = desc_act and static_groups
    groups = (
        order // group_size if is_static else torch.arange(K, device=H.device) // group_size
    )  # (K,) of the ordered columns
    num_groups = K // group_size
    importance = 1 / U.diagonal().square()  # (K,)

    def grid_of(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return find_grid(values, bits, symmetric=symmetric, range_method=range_method, importance=weights,
                         scale_dtype=scale_dtype)  # fmt: skip

    grouped = group_rows(weight, group_size)  # (N, G, g): checks that the groups divide
    scales, zeros = W.new_empty(num_groups, N), W.new_empty(num_groups, N)
    if is_static:
        in_place = torch.empty_like(importance).scatter_(0, order, importance).view(num_groups, group_size)
        scale, zero = grid_of(grouped.to(dtype), in_place)
        scales, zeros = scale[..., 0].t().contiguous(), zero[..., 0].t().contiguous()

    W = W.t().contiguous()  # (K, N): a column of the weight is now a row in memory
    Q = torch.empty_like(W)
    for start in range(0, K, update_block_size):
        end = min(start + update_block_size, K)
        errors = torch.empty_like(W[start:end])
        for j, after in runs(start, end, group_size):
            if not is_static and j % group_size == 0:
                last = j + group_size
                values = W[j:last]
                if last > end:  # the group's later columns still lack this block's updates
                    values = values.clone()
                    values[end - j :].addmm_(U[start:j, end:last].t(), errors[: j - start], alpha=-1)
                scale, zero = grid_of(values.t(), importance[j:last])
                scales[j // group_size], zeros[j // group_size] = scale[:, 0], zero[:, 0]
            of = groups[j:after] if is_static else groups[j : j + 1]
            Q[j:after], errors[j - start : after - start] = quantize_run(
                W[j:after], U[j:after, j:after], scales[of], zeros[of], bits
            )
            W[after:end].addmm_(U[j:after, after:end].t(), errors[j - start : after - start], alpha=-1)
        W[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)

    inverse = torch.argsort(order)
    g_idx = groups[inverse]
    q = Q[inverse].t().contiguous()  # (N, K)
    if refinements:
        damped = H + damp_percent * H.diagonal().mean() * torch.eye(K, dtype=dtype, device=H.device)
        W = weight.to(dtype)
        for _ in range(refinements):
            scales = round_scale(refit_scales(W, damped, q, scales, zeros, g_idx), scale_dtype)
            q = descend(W, damped, q, scales, zeros, g_idx, bits, update_block_size=update_block_size)
    return QuantizedWeight(q.to(torch.uint8), scales, zeros.to(torch.uint8), g_idx.int())


def runs(start: int, end: int, group_size: int) -> Iterable[tuple[int, int]]:
    """[start, end) cut where groups begin."""
    return pairwise(sorted({start, *range(-(-start // group_size) * group_size, end, group_size), end}))


def kernel_takes(W: Tensor, scales: Tensor) -> bool:
    """Whether the kernel quantizes these columns; without Triton, and elsewhere, PyTorch does."""
    is_there = HAS_TRITON and W.device.type == "cuda"
    return is_there and W.dtype == torch.float32 and len(scales) == 1 and len(W) in KERNEL_RUNS


def quantize_run(W: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers and errors (n, N) of n columns that follow each other, each made up for by those after it.

    W       (n, N)       columns, updated for all before them
    U       (n, n)       their part of the Cholesky factor
    scales  (1 or n, N)  and zeros: of all columns, or of each
    """
    n = len(W)
    if kernel_takes(W, scales):
        q, errors = gptq_quantize_block(W.t().contiguous(), U, scales.t(), zeros.t(), 2**bits - 1)
        return q.t().to(W.dtype), errors.t()
    scales, zeros = scales.expand(n, -1), zeros.expand(n, -1)
    W, q, errors = W.clone(), torch.empty_like(W), torch.empty_like(W)
    for j in range(n):
        q[j] = quantize_to_grid(W[j], scales[j], zeros[j], bits)
        errors[j] = (W[j] - dequantize_from_grid(q[j], scales[j], zeros[j])) / U[j, j]
        W[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return q, errors


def inverse_cholesky(
    hessian: Tensor,
    damp_percent: float = DAMP_PERCENT,
    *,
    name: str = "the weight",
    num_samples: int | None = None,
) -> Tensor:
    """The upper triangular U with U^T U = (hessian + damping)^-1, in float64. (K, K) to (K, K).

    Columns that no calibration input reached need nothing special: the damping is their diagonal. A Hessian that stays
    singular is damped more, with a warning; one that cannot be saved raises ValueError.
    """
    H = hessian.double()
    mean = H.diagonal().mean()
    damp = damp_percent
    while mean > 0 and damp <= LARGEST_DAMP:
        damped = H + damp * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)
        # With J reversing the order, J H J = L L^T gives H = (J L J)(J L J)^T, J L J upper: no inverse is factored.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0:
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, torch.eye(len(H), dtype=H.dtype, device=H.device), upper=True)
        damp = max(damp, 1e-4) * DAMP_GROWTH
        logger.warning(
            f"The Hessian of {name} ({_samples(num_samples)}) is singular; damping it with {damp:g} of its mean."
        )
    raise ValueError(
        f"The Hessian of {name} ({_samples(num_samples)}) stays singular even with a damping of {LARGEST_DAMP:g} of "
        f"its mean diagonal, {float(mean):.3g}. Calibrate with more and more varied text, or leave the layer out with "
        "`skip_modules`."
    )


def refit_scales(W: Tensor, H: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> Tensor:
    """The scales (G, N) with the least output error for fixed integers: one G x G least-squares system for each row.

    With c_i the columns of q - zero_point in group i, d/ds of (w - sum_i s_i c_i) H (w - sum_i s_i c_i)^T is zero where
    sum_j (c_i H c_j^T) s_j = c_i H w^T. A row whose solution has a scale below a tenth of the old one keeps its scales.
    """
    num_groups, N = scales.shape
    order = torch.argsort(g_idx, stable=True)  # the columns of a group side by side
    C, ordered = (q - zeros[g_idx].t())[:, order], H[order][:, order]  # (N, K), (K, K)
    A = C.new_zeros(N, num_groups, num_groups)
    for j, rows in enumerate(ordered.chunk(num_groups)):
        first = j * len(rows)
        towards = C[:, first:] * (C[:, first : first + len(rows)] @ rows[:, first:])
        A[:, j:, j] = towards.view(N, num_groups - j, -1).sum(-1)
    A = A + A.tril(-1).mT
    b = (C * (W @ H[:, order])).view(N, num_groups, -1).sum(-1)  # (N, G)
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)
    A = A + ridge[:, None, None] * torch.eye(num_groups, dtype=A.dtype, device=A.device)
    old = scales.t()  # (N, G)
    right = b + ridge[:, None] * old
    solution = torch.linalg.solve(A, right)
    is_sound = (solution > 0.1 * old).all(-1, keepdim=True)
    return torch.where(is_sound, solution, old).t().contiguous()


def descend(
    W: Tensor,
    H: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    bits: int,
    *,
    update_block_size: int = UPDATE_BLOCK_SIZE,
) -> Tensor:
    """One sweep of coordinate descent: each column in turn takes the integers that are best given all the others.

    The error tr((W - Q) H (W - Q)^T) never grows. (N, K) integers as float to (N, K) integers as float.
    """
    K = W.shape[1]
    q = q.t().clone()  # (K, N)
    scale, zero = scales[g_idx], zeros[g_idx]  # (K, N)
    gradient = H @ (scale * (q - zero) - W.t())  # (K, N): half the gradient with respect to the quantized weight
    for start in range(0, K, update_block_size):
        end = min(start + update_block_size, K)
        steps = torch.empty_like(q[start:end])
        for j in range(start, end):
            current = scale[j] * (q[j] - zero[j])
            best = quantize_to_grid(current - gradient[j] / H[j, j], scale[j], zero[j], bits)
            step = scale[j] * (best - q[j])
            q[j] = best
            gradient[start:end].addr_(H[j, start:end], step)
            steps[j - start] = step
        gradient[:start].addmm_(H[:start, start:end], steps)
        gradient[end:].addmm_(H[end:, start:end], steps)
    return q.t().contiguous()


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T): the share of the outputs' energy that quantization changed."""
    difference = (weight - quantized).double()
    H = hessian.double()
    return float(((difference @ H) * difference).sum() / ((weight.double() @ H) * weight.double()).sum())


def _check(weight: Tensor, hessian: Tensor, name: str) -> None:
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"{name}: expected a weight (N, K) and a Hessian (K, K), "
            f"got {tuple(weight.shape)} and {tuple(hessian.shape)}."
        )
    check_weight(weight, name)
    if not hessian.isfinite().all():
        raise ValueError(f"The inputs of {name} were NaN or infinite during calibration. Check the model on this data.")


def _samples(num_samples: int | None) -> str:
    return "unknown number of samples" if num_samples is None else f"{num_samples} calibration samples"
