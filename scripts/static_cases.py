"""The kernels and configurations that the static gate compiles, and the limits that each is held to."""

from dataclasses import dataclass, field

import torch
from hf_compress_kernels.planes import choose_tile_k
from hf_compress_kernels.tuning import rule
from hf_compress_kernels.wna16_kernels import wna16_dequant_kernel, wna16_linear_kernel
from hf_compress_kernels.wna16_launch import kernel_constants

POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
K = 4096

# Thread instructions per weight in the main loop, for tiles of 128 rows with float16 (bits, M) -> (sm_80, sm_90).
PER_WEIGHT = {
    (4, 8): (2.2, 2.5), (4, 16): (2.4, 2.6), (4, 32): (2.8, 2.8),
    (8, 8): (2.6, 2.6), (8, 16): (2.6, 2.6), (8, 32): (3.0, 2.8),
    (2, 8): (2.2, 2.5), (2, 16): (2.4, 2.6), (2, 32): (2.8, 2.8),
    (3, 8): (3.6, 4.0), (3, 16): (3.6, 4.0), (3, 32): (3.6, 4.0),
}  # fmt: skip
BF16_MAY_ADD = 0.3
BYTES_TO_BF16_MAY_ADD = 1.5  # 8-bit integers go through float32, see magic.py


@dataclass(frozen=True)
class Case:
    name: str
    arch: str
    kernel: object
    signature: dict  # of the arguments that are not compile-time constants
    constants: dict
    num_warps: int
    num_stages: int
    multiples_of_16: tuple = ()
    weights: int = 0  # weights that one pass of the main loop consumes, all threads together
    limits: dict = field(default_factory=dict)


def _arch_constants(constants: dict, arch: str) -> dict:
    return constants if arch.startswith("sm_") else {**constants, "USE_ASM": False, "ASM": "", "OPERANDS": ""}


def wna16_linear(arch: str, bits: int, M: int, dtype: torch.dtype, group_size: int = 128, perm: bool = False) -> Case:
    c = rule(arch, bits, M)
    tile_k = choose_tile_k(bits, K, group_size)
    constants = kernel_constants(bits, group_size, K, tile_k, dtype, asm=True)
    decode = M <= 32
    through_float32 = bits == 8 and dtype == torch.bfloat16
    limits = {"programs": 1 if not decode else 3 if M <= 16 and not through_float32 else 2, "mma": True}
    if decode:
        if arch in ("sm_80", "sm_90") and not perm:
            limits["loads"] = 0
        limits["buffers"] = c.num_stages - 1
        if arch in ("sm_80", "sm_90") and group_size == 128 and not perm:
            limit = PER_WEIGHT[bits, M][arch == "sm_90"]
            if dtype == torch.bfloat16:
                limit += BYTES_TO_BF16_MAY_ADD if through_float32 else BF16_MAY_ADD
            limits["per_weight"] = round(limit, 2)
    return Case(
        name=f"wna16_linear {bits}-bit {str(dtype)[6:]} M={M} g={group_size}{' act-order' if perm else ''}",
        arch=arch,
        kernel=wna16_linear_kernel,
        signature=dict(x_ptr=POINTER[dtype], qweight_ptr="*i16", sz_ptr="*i32", perm_ptr="*i32",
                       bias_ptr=POINTER[dtype], y_ptr=POINTER[dtype], partial_ptr="*fp32", ticket_ptr="*i32",
                       M="i32", N="i32", K="i32", stride_xm="i32", stride_ym="i32"),
        constants=dict(_arch_constants(constants, arch), BLOCK_M=c.block_m, BLOCK_N=c.block_n,
                       SPLIT_K=4 if decode else 2 if M <= 64 else 1, HAS_PERM=perm, HAS_BIAS=True, EVEN_K=True),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        multiples_of_16=("N", "K", "stride_xm", "stride_ym"),
        weights=c.block_n * tile_k,
        limits=limits,
    )  # fmt: skip


def wna16_dequant(arch: str, bits: int, dtype: torch.dtype) -> Case:
    tile_k = choose_tile_k(bits, K, 128)
    return Case(
        name=f"wna16_dequant {bits}-bit {str(dtype)[6:]}",
        arch=arch,
        kernel=wna16_dequant_kernel,
        signature=dict(qweight_ptr="*i16", sz_ptr="*i32", perm_ptr="*i32", weight_ptr=POINTER[dtype], N="i32", K="i32",
                       first_tile="i32"),
        constants=dict(_arch_constants(kernel_constants(bits, 128, K, tile_k, dtype, asm=True), arch), HAS_PERM=False),
        num_warps=4,
        num_stages=3,
        multiples_of_16=("N", "K"),
    )  # fmt: skip


def _wna16_cases() -> list[Case]:
    half, bf16 = torch.float16, torch.bfloat16
    cases = [
        wna16_linear(arch, bits, M, dtype)
        for arch in ("sm_80", "sm_90")
        for bits in (4, 8, 2, 3)
        for dtype in (half, bf16)
        for M in (8, 16, 32, 64, 128)
    ]
    cases += [
        wna16_linear(arch, bits, M, half)
        for arch in ("sm_86", "sm_89", "sm_100", "gfx942")
        for bits in (4, 8, 2, 3)
        for M in ((8, 128) if bits == 4 else (128,))
    ]
    cases += [wna16_linear(arch, 4, 8, half, group_size=32) for arch in ("sm_80", "sm_90")]
    cases += [wna16_linear(arch, 4, 8, half, perm=True) for arch in ("sm_80", "sm_90")]
    return cases + [wna16_dequant(arch, bits, half) for arch in ("sm_80", "sm_90", "gfx942") for bits in (4, 8, 2, 3)]


def all_cases() -> list[Case]:
    return _wna16_cases()
