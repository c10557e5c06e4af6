"""Triton kernels of low-bit linear layers: the product, split over K with a fixed order of sums, and dequantization.

The weight is the left operand of the tensor cores, W (BLOCK_N, K) times x^T (K, BLOCK_M), so that one row of x wastes
7/8 of the smallest tile and not 15/16. Operands are the exact integers q - zero; the scale of a group multiplies the
group's float32 sum. USE_ASM selects the decoders of `magic.py` over the plain arithmetic; UPCAST computes in float32,
for Triton's interpreter, whose bfloat16 arithmetic is wrong.
"""

import triton
import triton.language as tl


@triton.jit
def _split_sz(sz, BF16: tl.constexpr):
    """Scale and zero + magic of a packed word, float32."""
    if BF16:
        return (sz << 16).to(tl.float32, bitcast=True), (sz & -65536).to(tl.float32, bitcast=True)
    scale = (sz & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (sz >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _addend(zero, words, POSITION: tl.constexpr, BF16: tl.constexpr):
    """-(magic * 2^-POSITION + zero) of each row, spread over the row's words."""
    magic: tl.constexpr = 128.0 if BF16 else 1024.0
    value = (magic - magic / (1 << POSITION)) - zero
    value = value.to(tl.bfloat16) if BF16 else value.to(tl.float16)
    return tl.broadcast_to(value[:, None], words.shape)


# Triton wants the dtypes of the results as a literal, hence one function per number of planes.
@triton.jit
def _asm_2(ASM: tl.constexpr, OPERANDS: tl.constexpr, args):
    return tl.inline_asm_elementwise(ASM, OPERANDS, args, (tl.int16, tl.int16), is_pure=True, pack=2)


@triton.jit
def _asm_4(ASM: tl.constexpr, OPERANDS: tl.constexpr, args):
    return tl.inline_asm_elementwise(
        ASM, OPERANDS, args, (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
    )


@triton.jit
def _asm_8(ASM: tl.constexpr, OPERANDS: tl.constexpr, args):
    return tl.inline_asm_elementwise(
        ASM,
        OPERANDS,
        args,
        (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _asm_16(ASM: tl.constexpr, OPERANDS: tl.constexpr, args):
    return tl.inline_asm_elementwise(
        ASM,
        OPERANDS,
        args,
        (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
         tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=2,
    )  # fmt: skip


@triton.jit
def _decode_asm(
    words, high, third, zero, BITS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, OPERANDS: tl.constexpr
):
    """All planes of the words, as the bits of q - zero in 16-bit floats. `zero` is zero + magic."""
    c0 = _addend(zero, words, 0, BF16)
    if BITS == 8:
        if BF16:
            planes = _asm_2(ASM, OPERANDS, (words, tl.broadcast_to(-8388608.0 - zero[:, None], words.shape)))
        else:
            planes = _asm_2(ASM, OPERANDS, (words, c0))
    elif BITS == 4:
        if BF16:
            planes = _asm_4(ASM, OPERANDS, (words, c0))
        else:
            planes = _asm_4(ASM, OPERANDS, (words, c0, _addend(zero, words, 4, BF16)))
    else:
        c2 = _addend(zero, words, 2, BF16)
        c4 = _addend(zero, words, 4, BF16)
        c6 = _addend(zero, words, 6, BF16)
        if BITS == 2:
            if BF16:
                planes = _asm_8(ASM, OPERANDS, (words, c0, c2, c4))
            else:
                planes = _asm_8(ASM, OPERANDS, (words, c0, c2, c4, c6, _addend(zero, words, 8, BF16)))
        elif BF16:
            planes = _asm_16(ASM, OPERANDS, (words, high, third, c0, c2, c4))
        else:
            planes = _asm_16(ASM, OPERANDS, (words, high, third, c0, c2, c4, c6))
    return planes


@triton.jit
def _plane(words, high, third, PLANE: tl.constexpr, BITS: tl.constexpr):
    """The integers of one plane: the plain twin of the decoders."""
    if BITS != 3:
        return (words >> (BITS * PLANE)) & ((1 << BITS) - 1)
    half: tl.constexpr = PLANE // 8
    j: tl.constexpr = PLANE % 8
    third_bit: tl.constexpr = half if j == 7 else 2 * (j % 4) + 2 + half + 8 * (j // 4)
    crumbs = words if half == 0 else high
    return ((crumbs >> (2 * j)) & 3) | (((third >> third_bit) & 1) << 2)


@triton.jit
def _operand(planes, words, high, third, zero, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr,
             USE_ASM: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One plane of q - zero, in the dtype of x (float32 when UPCAST)."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if USE_ASM:
        return planes[PLANE].to(dtype, bitcast=True)
    q = _plane(words, high, third, PLANE, BITS)
    magic: tl.constexpr = (0.0 if BITS == 8 else 128.0) if BF16 else 1024.0
    value = q.to(tl.float32) - (zero[:, None] - magic)
    return value if UPCAST else value.to(dtype)


@triton.jit
def wna16_linear_kernel(
    x_ptr,
    qweight_ptr,
    sz_ptr,
    perm_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    ticket_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_ym,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_PERM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BF16: tl.constexpr,
    USE_ASM: tl.constexpr,
    UPCAST: tl.constexpr,
    ASM: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """y = x W^T + bias. A tile of TILE_K columns is PIECES runs of PIECE columns, each inside one group.

    Grid: (tiles of y, SPLIT_K). With SPLIT_K > 1 every program writes its float32 sums to `partial`
    (SPLIT_K, tiles, BLOCK_N, BLOCK_M); the one that draws the last ticket of a tile adds them in order, so the result
    has the same bits on every run. Tickets are zero before and after.
    """
    P: tl.constexpr = 16 if BITS == 3 else TILE_K * BITS // 16
    WORDS: tl.constexpr = 48 if BITS == 3 else P  # int16 words of a row in a tile
    PIECES: tl.constexpr = TILE_K // PIECE
    PLANES: tl.constexpr = PIECE // P
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_n = pid // tiles_m
    split = tl.program_id(1)
    num_kt = tl.cdiv(K, TILE_K)
    padded_n = tl.cdiv(N, 64) * 64

    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, P)
    # Rows past the end repeat the last one: reads stay in bounds without a mask, and nothing of them is stored.
    x_rows = x_ptr + tl.minimum(rm, M - 1).to(tl.int64) * stride_xm
    rows_n = tl.minimum(rn, padded_n - 1)
    tile_rows = rows_n % 64
    tiles = qweight_ptr + (rows_n // 64).to(tl.int64) * (num_kt * 64 * WORDS)
    if BITS == 3:
        word_ptrs = (tiles + tile_rows * 32)[:, None] + t[None, :]
        third_ptrs = (tiles + 64 * 32 + tile_rows * 16)[:, None] + t[None, :]
    else:
        word_ptrs = (tiles + tile_rows * P)[:, None] + t[None, :]

    tiles_per_split = tl.cdiv(num_kt, SPLIT_K)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_kt)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for kt in range(first, last):
        words = tl.load(word_ptrs + kt * (64 * WORDS), eviction_policy="evict_first")  # (BLOCK_N, P)
        high = words
        third = words
        if BITS == 3:
            high = tl.load(word_ptrs + kt * (64 * WORDS) + 16, eviction_policy="evict_first")
            third = tl.load(third_ptrs + kt * (64 * WORDS), eviction_policy="evict_first")
        for piece in tl.static_range(PIECES):
            k_piece = kt * TILE_K + piece * PIECE
            scale, zero = _split_sz(tl.load(sz_ptr + k_piece // GROUP_SIZE * padded_n + rows_n), BF16)
            planes = (words,)
            if USE_ASM:
                planes = _decode_asm(words, high, third, zero, BITS, BF16, ASM, OPERANDS)
            product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for j in tl.static_range(PLANES):
                cols = k_piece + j * P + t
                source = cols
                if HAS_PERM:
                    source = tl.load(perm_ptr + cols, mask=cols < K, other=0)
                if EVEN_K:
                    x = tl.load(x_rows[None, :] + source[:, None])  # (P, BLOCK_M)
                else:
                    x = tl.load(x_rows[None, :] + source[:, None], mask=(cols < K)[:, None], other=0.0)
                w = _operand(planes, words, high, third, zero, piece * PLANES + j, BITS, BF16, USE_ASM, UPCAST)
                if UPCAST:
                    product = tl.dot(w, x.to(tl.float32), product, input_precision="ieee")
                else:
                    product = tl.dot(w, x, product)
            acc += product * scale[:, None]

    y_ptrs = y_ptr + rm.to(tl.int64)[None, :] * stride_ym + rn[:, None]
    y_mask = (rm < M)[None, :] & (rn < N)[:, None]
    if SPLIT_K == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
    else:
        num_tiles = tl.num_programs(0)
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        slot = (split * num_tiles + pid).to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(partial_ptr + slot + inside, acc)
        tl.debug_barrier()  # all stores of this program come before its ticket
        drawn = tl.atomic_add(ticket_ptr + pid, 1, sem="acq_rel")
        if drawn == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for s in range(SPLIT_K):
                slot = (pid + s * num_tiles).to(tl.int64) * (BLOCK_N * BLOCK_M)
                total += tl.load(partial_ptr + slot + inside, cache_modifier=".cg")
            if HAS_BIAS:
                total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
            tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=y_mask)
            tl.store(ticket_ptr + pid, 0)


@triton.jit
def wna16_dequant_kernel(
    qweight_ptr,
    sz_ptr,
    perm_ptr,
    weight_ptr,
    N,
    K,
    first_tile,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_PERM: tl.constexpr,
    BF16: tl.constexpr,
    USE_ASM: tl.constexpr,
    UPCAST: tl.constexpr,
    ASM: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """scale * (q - zero), rounded once. Grid: (tiles of 64 rows, tiles of TILE_K columns).

    `weight` starts at row 64 * first_tile of the layer.
    """
    P: tl.constexpr = 16 if BITS == 3 else TILE_K * BITS // 16
    WORDS: tl.constexpr = 48 if BITS == 3 else P
    PIECES: tl.constexpr = TILE_K // PIECE
    PLANES: tl.constexpr = PIECE // P
    tile = tl.program_id(0)
    kt = tl.program_id(1)
    num_kt = tl.cdiv(K, TILE_K)
    padded_n = tl.cdiv(N, 64) * 64
    rows = tl.arange(0, 64)
    rn = (first_tile + tile) * 64 + rows
    t = tl.arange(0, P)
    start = qweight_ptr + ((first_tile + tile).to(tl.int64) * num_kt + kt) * (64 * WORDS)
    words = tl.load(start + (rows * (32 if BITS == 3 else P))[:, None] + t[None, :])
    high = words
    third = words
    if BITS == 3:
        high = tl.load(start + (rows * 32 + 16)[:, None] + t[None, :])
        third = tl.load(start + (64 * 32 + rows * 16)[:, None] + t[None, :])
    out_rows = weight_ptr + (tile * 64 + rows).to(tl.int64) * K
    for piece in tl.static_range(PIECES):
        k_piece = kt * TILE_K + piece * PIECE
        scale, zero = _split_sz(tl.load(sz_ptr + (k_piece // GROUP_SIZE) * padded_n + rn), BF16)
        planes = (words,)
        if USE_ASM:
            planes = _decode_asm(words, high, third, zero, BITS, BF16, ASM, OPERANDS)
        for j in tl.static_range(PLANES):
            cols = k_piece + j * P + t
            target = cols
            if HAS_PERM:
                target = tl.load(perm_ptr + cols, mask=cols < K, other=0)
            w = _operand(planes, words, high, third, zero, piece * PLANES + j, BITS, BF16, USE_ASM, UPCAST)
            value = w.to(tl.float32) * scale[:, None]
            mask = (rn < N)[:, None] & (cols < K)[None, :]
            tl.store(out_rows[:, None] + target[None, :], value.to(weight_ptr.dtype.element_ty), mask=mask)
