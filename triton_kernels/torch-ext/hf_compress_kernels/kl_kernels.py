"""Triton kernels of the Kullback-Leibler loss of two sets of logits: a row a program, logits read once in each pass."""

import triton
import triton.language as tl


@triton.jit
def _scaled(ptrs, mask, to_log2, LOWEST: tl.constexpr):
    """Logits over temperature, in units of log 2; what is masked or below LOWEST counts as LOWEST. NaN stays NaN."""
    x = tl.load(ptrs, mask=mask, other=LOWEST).to(tl.float32) * to_log2
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kl_kernel(
    student_ptr,
    teacher_ptr,
    mask_ptr,
    loss_ptr,
    lse_s_ptr,
    lse_t_ptr,
    V,
    stride_s,
    stride_t,
    to_log2,
    loss_scale,
    HAS_MASK: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """loss = T^2 KL(teacher || student) of a row, and both log-sum-exps (of logits over temperature, natural log).

    Every lane keeps the running maximum and sums of its own columns; lanes meet once, at the end.
    KL = E_t[t - s] - lse_t + lse_s.
    """
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0)
    student = student_ptr + row.to(tl.int64) * stride_s
    teacher = teacher_ptr + row.to(tl.int64) * stride_t
    end = V
    if HAS_MASK:
        end = V * tl.load(mask_ptr + row).to(tl.int32)  # nothing of a masked row is read
    lanes = tl.arange(0, BLOCK_V)
    max_s = tl.full((BLOCK_V,), LOWEST, tl.float32)
    max_t = tl.full((BLOCK_V,), LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK_V,), tl.float32)
    sum_t = tl.zeros((BLOCK_V,), tl.float32)
    gap = tl.zeros((BLOCK_V,), tl.float32)  # sum of e_t (t - s)
    for start in range(0, end, BLOCK_V):
        cols = start + lanes
        s = _scaled(student + cols, cols < V, to_log2, LOWEST)
        t = _scaled(teacher + cols, cols < V, to_log2, LOWEST)
        higher = tl.maximum(max_s, s)
        sum_s = sum_s * tl.exp2(max_s - higher) + tl.exp2(s - higher)
        max_s = higher
        higher = tl.maximum(max_t, t)
        shrink = tl.exp2(max_t - higher)
        e_t = tl.exp2(t - higher)
        sum_t = sum_t * shrink + e_t
        gap = gap * shrink + e_t * (t - s)
        max_t = higher
    top_s = tl.max(max_s, 0)
    top_t = tl.max(max_t, 0)
    lse_s = top_s + tl.log2(tl.sum(sum_s * tl.exp2(max_s - top_s), 0))
    weight = tl.exp2(max_t - top_t)
    total_t = tl.sum(sum_t * weight, 0)
    lse_t = top_t + tl.log2(total_t)
    loss = (tl.sum(gap * weight, 0) / total_t - lse_t + lse_s) * LN2 * loss_scale
    kept = end > 0
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0))
    tl.store(lse_s_ptr + row, tl.where(kept, lse_s * LN2, 0.0))
    tl.store(lse_t_ptr + row, tl.where(kept, lse_t * LN2, 0.0))


@triton.jit
def kl_grad_kernel(
    grad_ptr,
    student_ptr,
    teacher_ptr,
    lse_s_ptr,
    lse_t_ptr,
    mask_ptr,
    out_ptr,
    V,
    stride_s,
    stride_t,
    to_log2,
    temperature,
    HAS_MASK: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out = T * grad * (softmax_s - softmax_t), zero in masked rows. Grid: (rows, blocks of columns)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    end = V
    if HAS_MASK:
        end = V * tl.load(mask_ptr + row).to(tl.int32)  # nothing of a masked row is read
    keep = cols < end
    s = _scaled(student_ptr + row.to(tl.int64) * stride_s + cols, keep, to_log2, LOWEST)
    t = _scaled(teacher_ptr + row.to(tl.int64) * stride_t + cols, keep, to_log2, LOWEST)
    p_s = tl.exp2(s - tl.load(lse_s_ptr + row) * LOG2E)
    p_t = tl.exp2(t - tl.load(lse_t_ptr + row) * LOG2E)
    grad = (p_s - p_t) * (tl.load(grad_ptr + row) * temperature)
    grad = tl.where(keep, grad, 0.0)
    tl.store(out_ptr + row.to(tl.int64) * V + cols, grad.to(out_ptr.dtype.element_ty), mask=cols < V)
