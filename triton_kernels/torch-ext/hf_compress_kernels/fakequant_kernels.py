"""Triton kernels of fake quantization and its gradient, over groups (R, g) of values with one scale each."""

import triton
import triton.language as tl

from .rounding import round_to_even


@triton.jit
def fake_quant_kernel(
    x_ptr, scale_ptr, zero_ptr, y_ptr, R, g, qmin, qmax, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr
):
    """y = s * (clamp(round(x / s) + z, qmin, qmax) - z)."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    s = tl.load(scale_ptr + rows, mask=inside, other=1.0).to(tl.float32)[:, None]
    z = tl.load(zero_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    for start in range(0, g, BLOCK_G):
        cols = start + tl.arange(0, BLOCK_G)
        mask = inside[:, None] & (cols < g)[None, :]
        offsets = rows.to(tl.int64)[:, None] * g + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        q = tl.minimum(tl.maximum(round_to_even(tl.div_rn(x, s)) + z, qmin * 1.0), qmax * 1.0)
        tl.store(y_ptr + offsets, (s * (q - z)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fake_quant_grad_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    zero_ptr,
    grad_x_ptr,
    grad_scale_ptr,
    R,
    g,
    qmin,
    qmax,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Straight through where nothing was clamped; the learned-step gradient, summed over a group in a fixed order."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    s = tl.load(scale_ptr + rows, mask=inside, other=1.0).to(tl.float32)[:, None]
    z = tl.load(zero_ptr + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_G), tl.float32)
    for start in range(0, g, BLOCK_G):
        cols = start + tl.arange(0, BLOCK_G)
        mask = inside[:, None] & (cols < g)[None, :]
        offsets = rows.to(tl.int64)[:, None] * g + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        step = tl.div_rn(x, s)
        rounded = round_to_even(step)
        q = rounded + z
        clamped = tl.minimum(tl.maximum(q, qmin * 1.0), qmax * 1.0)
        kept = q == clamped
        total += grad * tl.where(kept, rounded - step, clamped - z)
        tl.store(grad_x_ptr + offsets, tl.where(kept, grad, 0.0).to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_scale_ptr + rows, tl.sum(total, 1), mask=inside)
