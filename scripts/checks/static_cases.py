"""The kernels and configurations that the static gate compiles, and the limits that each is held to."""

from dataclasses import dataclass, field

import torch
from hf_compress_kernels.bsr_kernels import bsr_dw_kernel, bsr_linear_kernel
from hf_compress_kernels.bsr_launch import GROUP_M
from hf_compress_kernels.gptq_kernels import gptq_block_kernel
from hf_compress_kernels.gptq_launch import BLOCK_N
from hf_compress_kernels.kl_kernels import kl_grad_kernel, kl_kernel
from hf_compress_kernels.kl_launch import BLOCK_V, LOWEST
from hf_compress_kernels.planes import PackedWeight, choose_tile_k
from hf_compress_kernels.tuning import BSR_DW_ROWS, Device, bsr_rule, rule
from hf_compress_kernels.wna16_kernels import wna16_dequant_kernel, wna16_linear_kernel
from hf_compress_kernels.wna16_launch import kernel_constants

POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
K = 4096
TENSOR_INSTRUCTION = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}  # elsewhere mma
WGMMA_ROWS = 64  # of the smallest tile that wgmma takes

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
    options: dict = field(default_factory=dict)  # further options of the compiler
    multiples_of_16: tuple = ()
    weights: int = 0  # weights that one pass of the main loop consumes, all threads together
    limits: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.arch} {self.name}"


def _arch_constants(constants: dict, arch: str) -> dict:
    return constants if arch.startswith("sm_") else {**constants, "USE_ASM": False, "ASM": "", "OPERANDS": ""}


def _sizes(bits: int, group_size: int, tile_k: int, dtype: torch.dtype) -> PackedWeight:
    """A square weight of K columns without its tensors."""
    return PackedWeight(None, None, None, None, bits, group_size, K, K, tile_k, dtype)


def _tensor(arch: str, rows: int = 128) -> str:
    """The tensor-core instruction to expect for a left operand of `rows` rows."""
    return "mma" if arch == "sm_90" and rows < WGMMA_ROWS else TENSOR_INSTRUCTION.get(arch, "mma")


def wna16_linear(arch: str, bits: int, M: int, dtype: torch.dtype, group_size: int = 128, perm: bool = False) -> Case:
    c = rule(arch, bits, M)
    tile_k = choose_tile_k(bits, K, group_size)
    constants = kernel_constants(_sizes(bits, group_size, tile_k, dtype), asm=True)
    decode = M <= 32
    through_float32 = bits == 8 and dtype == torch.bfloat16
    limits = {"programs": 1 if not decode else 3 if M <= 16 and bits in (2, 4) else 2, "mma": _tensor(arch)}
    if decode:
        if arch in ("sm_80", "sm_90") and not perm:
            limits["loads"] = 0
        limits["buffers"] = c.num_stages - 1 if (arch, bits, M) == ("sm_80", 3, 32) else 3
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
    constants = kernel_constants(_sizes(bits, 128, choose_tile_k(bits, K, 128), dtype), asm=True)
    return Case(
        name=f"wna16_dequant {bits}-bit {str(dtype)[6:]}",
        arch=arch,
        kernel=wna16_dequant_kernel,
        signature=dict(qweight_ptr="*i16", sz_ptr="*i32", perm_ptr="*i32", weight_ptr=POINTER[dtype], N="i32", K="i32",
                       first_tile="i32"),
        constants=_arch_constants(dict(constants, HAS_PERM=False), arch),
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


def bsr_linear(arch: str, side: int, M: int, transposed: bool = False) -> Case:
    c = bsr_rule(Device(arch, arch, 1), M, side, side)
    limits = {"mma": _tensor(arch, c.block_m), "buffers": 2}
    if arch == "sm_80" and M >= 128 and side >= 32:
        limits["issue_share"] = 1.0
    return Case(
        name=f"bsr_{'dx' if transposed else 'linear'} {side}x{side} bfloat16 M={M}",
        arch=arch,
        kernel=bsr_linear_kernel,
        signature=dict(x_ptr="*bf16", values_ptr="*bf16", crow_ptr="*i32", col_ptr="*i32", perm_ptr="*i32",
                       bias_ptr="*bf16", y_ptr="*bf16", M="i32", K="i32", N="i32", block_rows="i32", num_blocks="i32",
                       stride_xm="i32", stride_ym="i32"),
        constants=dict(BLOCK_M=c.block_m, IN=side, OUT=side, TRANSPOSED=transposed, HAS_BIAS=not transposed,
                       EVEN_K=True, UPCAST=False, PRECISION="tf32", GROUP_M=GROUP_M),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        multiples_of_16=("K", "N", "stride_xm", "stride_ym"),
        limits=limits,
    )  # fmt: skip


def bsr_dw(arch: str, side: int) -> Case:
    return Case(
        name=f"bsr_dw {side}x{side} bfloat16",
        arch=arch,
        kernel=bsr_dw_kernel,
        signature=dict(grad_ptr="*bf16", x_ptr="*bf16", row_ptr="*i32", col_ptr="*i32", out_ptr="*bf16", M="i32",
                       N="i32", K="i32", stride_gm="i32", stride_xm="i32"),
        constants=dict(BLOCK_M=BSR_DW_ROWS, BN=side, BK=side, EVEN=True, UPCAST=False, PRECISION="tf32"),
        num_warps=bsr_rule(Device(arch, arch, 1), 4096, side, side).num_warps,
        num_stages=2 if arch.startswith("gfx") else 3,
        multiples_of_16=("N", "K", "stride_gm", "stride_xm"),
        limits={"mma": _tensor(arch, side)},
    )  # fmt: skip


def _pointwise_cases(arch: str) -> list[Case]:
    """Kernels without tensor cores: no spills, and they compile."""
    logits = dict(student_ptr="*bf16", teacher_ptr="*bf16", V="i32", stride_s="i32", stride_t="i32", to_log2="fp32",
                  lse_s_ptr="*fp32", lse_t_ptr="*fp32", mask_ptr="*u8")  # fmt: skip
    loss = dict(HAS_MASK=True, LOWEST=LOWEST, BLOCK_V=BLOCK_V)
    aligned = ("V", "stride_s", "stride_t")
    parts = [
        ("kl", kl_kernel, logits | dict(loss_ptr="*fp32", loss_scale="fp32"), loss, {}),
        ("kl_grad", kl_grad_kernel, logits | dict(grad_ptr="*fp32", out_ptr="*bf16", temperature="fp32"), loss, {}),
        ("gptq_block", gptq_block_kernel,
         dict(weight_ptr="*fp32", hinv_ptr="*fp32", scale_ptr="*fp32", zero_ptr="*fp32", q_ptr="*u8", err_ptr="*fp32",
              N="i32", stride_wn="i32", maxq="i32"),
         dict(B=128, GROUPS=1, BLOCK_N=BLOCK_N), {"enable_fp_fusion": False}),
    ]  # fmt: skip
    return [
        Case(
            name,
            arch,
            kernel,
            signature,
            constants,
            num_warps=4,
            num_stages=3,
            options=options,
            multiples_of_16=aligned,
        )
        for name, kernel, signature, constants, options in parts
    ]


def all_cases() -> list[Case]:
    cases = _wna16_cases()
    for arch in ("sm_80", "sm_90", "gfx942"):
        cases += [bsr_linear(arch, side, 4096) for side in (16, 32, 64, 128)]
        cases += [bsr_linear(arch, side, 4096, transposed=True) for side in (32, 64)]
        cases += [bsr_dw(arch, side) for side in (32, 64)]
        cases += _pointwise_cases(arch)
    return cases + [bsr_linear(arch, 32, 16) for arch in ("sm_80", "sm_90")]
