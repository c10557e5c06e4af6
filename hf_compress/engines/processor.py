"""What the user asked of the CPU, and what the processor can do."""

import logging
import os
import platform
from functools import cache
from pathlib import Path

import torch

from hf_compress.model.precision import cpu_has_bfloat16, is_amd, is_x86_with_onednn

logger = logging.getLogger(__name__)

VARIABLE = "HF_COMPRESS_CPU"
MODES = ("auto", "exact", "reference")
INSTRUCTIONS = {  # as PyTorch asks the processor; each has those above it
    "AVX2": "_is_avx2_supported",
    "AVX-512": "_is_avx512_supported",
    "VNNI": "_is_vnni_supported",
    "AVX512-BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}


def mode() -> str:
    """What HF_COMPRESS_CPU asks for. Raises ValueError for an unknown word."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {value!r}.")
    return value


@cache
def instructions() -> dict[str, bool]:
    """Which of `INSTRUCTIONS` the processor has, whatever a cap forbids."""
    return {name: bool(getattr(torch.cpu, flag, lambda: False)()) for name, flag in INSTRUCTIONS.items()}


@cache
def name() -> str:
    """What the system calls it and the most it can do, such as "AMD EPYC with AVX512-BF16".

    Virtual machines call processors of very different speed by one name.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    called = platform.processor() or platform.machine()
    if told:  # ARM tells the number of its core alone
        called = f"{called} {told[0]}" if told[0].startswith("0x") else told[0]
    most = next((one for one, there in reversed(instructions().items()) if there), None)
    return called if most is None else f"{called} with {most}"


@cache
def has_int8() -> bool:
    """Whether oneDNN's products of 8-bit integers are exact.

    Below VNNI its instructions add pairs of products in 16 bits and clip the sum without a word, so the processor is
    asked: 64 times 255 * 127 is far outside 16 bits. The answer is that of the cap too.
    """
    if not is_x86_with_onednn():
        return False
    try:
        weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
        y = torch.ops.onednn.qlinear_pointwise(
            torch.full((1, 64), 255, dtype=torch.uint8), 1.0, 0, weight, torch.ones(16),
            torch.zeros(16, dtype=torch.int32), None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # a torch with another oneDNN, or none
        logger.info("This PyTorch multiplies no 8-bit integers: %s", error)
        return False
    return bool((y == 64 * 255 * 127).all())


def has_bfloat16() -> bool:
    """Whether dense matrices multiply faster in bfloat16 than in float32."""
    return cpu_has_bfloat16()


@cache
def has_slow_mkl() -> bool:
    """Whether `F.linear` in float32 goes through MKL on a processor of another maker, which oneDNN serves better."""
    return is_x86_with_onednn() and torch.backends.mkl.is_available() and is_amd()


def has_avx512() -> bool:
    """Whether ATen's own kernels use AVX-512, unless ATEN_CPU_CAPABILITY forbids it."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
