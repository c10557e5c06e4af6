"""Triton kernels of block-sparse layers: the product, also on the transposed index, and the gradient of the blocks."""

import triton
import triton.language as tl


@triton.jit
def bsr_linear_kernel(
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    perm_ptr,
    bias_ptr,
    y_ptr,
    M,
    K,
    N,
    block_rows,
    num_blocks,
    stride_xm,
    stride_ym,
    BLOCK_M: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y (M, N) = x (M, K) W^T + bias, for the blocks (OUT, IN) of W in the rows of an index.

    TRANSPOSED: the index is the transposed one; block i of it is values[perm[i]], stored as (IN, OUT). One program
    makes BLOCK_M rows of one block row. Columns are read one step ahead: with the plain load of col[i] in step i Triton
    cannot pipeline the loads that depend on it.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    # GROUP_M tiles of x stay in cache while the block rows pass by.
    group = pid // (GROUP_M * block_rows)
    first_m = group * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * block_rows)) % size_m
    row = (pid % (GROUP_M * block_rows)) // size_m

    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ri = tl.arange(0, IN)
    ro = tl.arange(0, OUT)
    x_rows = x_ptr + tl.minimum(rm, M - 1).to(tl.int64) * stride_xm
    inside = ri[:, None] * OUT + ro[None, :] if TRANSPOSED else ro[None, :] * IN + ri[:, None]  # (IN, OUT)
    first = tl.load(crow_ptr + row)
    last = tl.load(crow_ptr + row + 1)
    acc = tl.zeros((BLOCK_M, OUT), dtype=tl.float32)
    col = tl.load(col_ptr + first)
    place = first
    if TRANSPOSED:
        place = tl.load(perm_ptr + tl.minimum(first, num_blocks - 1))
    for i in range(first, last):
        cols = col * IN + ri
        if EVEN_K:
            x = tl.load(x_rows[:, None] + cols[None, :])
        else:
            x = tl.load(x_rows[:, None] + cols[None, :], mask=(cols < K)[None, :], other=0.0)
        v = tl.load(values_ptr + place.to(tl.int64) * (IN * OUT) + inside)
        if UPCAST:
            acc = tl.dot(x.to(tl.float32), v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, v, acc, input_precision=PRECISION)
        following = i + first * 0 + 1  # a tensor in the interpreter as well
        col = tl.load(col_ptr + following)
        place = following
        if TRANSPOSED:
            place = tl.load(perm_ptr + tl.minimum(following, num_blocks - 1))
    rn = row * OUT + ro
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rm.to(tl.int64)[:, None] * stride_ym + rn[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def bsr_dw_kernel(
    grad_ptr,
    x_ptr,
    row_ptr,
    col_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_gm,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Block b of out (num_blocks, BN, BK) = grad[:, its rows]^T x[:, its columns], summed over M in order."""
    b = tl.program_id(0)
    rn = tl.load(row_ptr + b) * BN + tl.arange(0, BN)
    rk = tl.load(col_ptr + b) * BK + tl.arange(0, BK)
    steps = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        rm = start + steps
        grad_ptrs = grad_ptr + rm.to(tl.int64)[None, :] * stride_gm + rn[:, None]
        x_ptrs = x_ptr + rm.to(tl.int64)[:, None] * stride_xm + rk[None, :]
        if EVEN:
            grad = tl.load(grad_ptrs, mask=(rm < M)[None, :], other=0.0)  # (BN, BLOCK_M)
            x = tl.load(x_ptrs, mask=(rm < M)[:, None], other=0.0)  # (BLOCK_M, BK)
        else:
            grad = tl.load(grad_ptrs, mask=(rm < M)[None, :] & (rn < N)[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=(rm < M)[:, None] & (rk < K)[None, :], other=0.0)
        if UPCAST:
            acc = tl.dot(grad.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(grad, x, acc, input_precision=PRECISION)
    inside = tl.arange(0, BN)[:, None] * BK + tl.arange(0, BK)[None, :]
    tl.store(out_ptr + b.to(tl.int64) * (BN * BK) + inside, acc.to(out_ptr.dtype.element_ty))
