"""Triton kernel of GPTQ's inner loop: a few rows of a block of columns live in registers while their errors spread."""

import triton
import triton.language as tl

from .rounding import round_to_even


@triton.jit
def gptq_block_kernel(
    weight_ptr,
    hinv_ptr,
    scale_ptr,
    zero_ptr,
    q_ptr,
    err_ptr,
    N,
    stride_wn,
    maxq,
    B: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compile with enable_fp_fusion=False: the integers are then those of the reference."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, B)
    inside = rn < N
    W = tl.load(weight_ptr + rn.to(tl.int64)[:, None] * stride_wn + cols[None, :], mask=inside[:, None], other=0.0)
    for i in range(B):
        w = tl.sum(tl.where(cols[None, :] == i, W, 0.0), 1)  # (BLOCK_N,): column i
        group = rn * GROUPS + i * GROUPS // B
        s = tl.load(scale_ptr + group, mask=inside, other=1.0)
        z = tl.load(zero_ptr + group, mask=inside, other=0.0)
        q = tl.minimum(tl.maximum(round_to_even(tl.div_rn(w, s)) + z, 0.0), maxq * 1.0)
        err = tl.div_rn(w - s * (q - z), tl.load(hinv_ptr + i * B + i))
        row = tl.load(hinv_ptr + i * B + cols, mask=cols >= i, other=0.0)
        W -= err[:, None] * row[None, :]
        out = rn.to(tl.int64) * B + i
        tl.store(q_ptr + out, q.to(tl.uint8), mask=inside)
        tl.store(err_ptr + out, err, mask=inside)
