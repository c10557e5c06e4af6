"""What the user asked of the CPU, and what the processor can do under the caps of oneDNN."""

import logging
import os
import platform
from functools import cache

import torch

logger = logging.getLogger(__name__)

VARIABLE = "HF_COMPRESS_CPU"
MODES = ("auto", "exact", "reference")
CAP = "ONEDNN_MAX_CPU_ISA"
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def mode() -> str:
    """What HF_COMPRESS_CPU asks for. Raises ValueError for an unknown word."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {value!r}.")
    return value


@cache
def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 faster than float32: AVX512_BF16 or AMX, unless its cap forbids them."""
    if not _is_x86_with_onednn() or os.environ.get(CAP, "").upper() in WITHOUT_BFLOAT16:
        return False
    flags = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(flag() for flag in flags if flag is not None)


@cache
def has_int8() -> bool:
    """Whether oneDNN's products of 8-bit integers are exact.

    Below VNNI its instructions add pairs of products in 16 bits and clip the sum without a word, so the processor is
    asked: 64 times 255 * 127 is far outside 16 bits. The answer is that of the cap too.
    """
    if not _is_x86_with_onednn():
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


def fast_dtype() -> torch.dtype:
    """The dtype in which this processor multiplies dense matrices fastest."""
    return torch.bfloat16 if has_bfloat16() else torch.float32


def _is_x86_with_onednn() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
