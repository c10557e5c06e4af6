"""Dtypes by name; and where bfloat16 pays: on processors that multiply it several times faster, and on most GPUs."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress.model.classes import ModelT

CAP = "ONEDNN_MAX_CPU_ISA"  # what oneDNN reads once, at its start
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
WITHOUT_AMX = WITHOUT_BFLOAT16 | {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def has_fast_bfloat16(device: torch.device | None = None) -> bool:
    """Whether bf16 autocast pays on `device`, by default a GPU if there is one, else the CPU."""
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    return kind == "cpu" and cpu_has_bfloat16()


@cache
def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 faster than float32: by AMX, or AMD's AVX512_BF16, unless its cap forbids it.

    Intel's AVX512_BF16 has one of the two units that multiply float32: 86 and 160 GFLOP/s on an Emerald Rapids whose
    virtual machine hides AMX.
    """
    cap = os.environ.get(CAP, "").upper()
    if not is_x86_with_onednn() or cap in WITHOUT_BFLOAT16:
        return False
    has = {name: getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")}
    return (has["amx_tile"] and cap not in WITHOUT_AMX) or (has["avx512_bf16"] and is_amd())


def is_x86_with_onednn() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


@cache
def is_amd() -> bool:
    """Whether the processor is one of AMD, as Linux, or elsewhere Python, tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else platform.processor())


@contextmanager
def fast_matmul(*, enabled: bool = True) -> Iterator[None]:
    """Let float32 products on the CPU multiply in bfloat16 and add in float32, where the processor has units for it."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if enabled and cpu_has_bfloat16() else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def fast_forward(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where `device` has units for it; states that layers add up stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and has_fast_bfloat16(device))


@contextmanager
def attention_with_fast_gradients(*, enabled: bool = True) -> Iterator[None]:
    """Let fused attention that is differentiated on a CPU run in float32, also under autocast.

    Its gradients in bfloat16 took nine times as long for 32 tokens, and as long for 512 (Xeon with AMX, torch 2.13).
    """
    if not enabled:
        yield
        return
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_in_float32, before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _in_float32(attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                **options):  # fmt: skip
    """`attend`, an attention function of Transformers, with its dtype but in float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if not (query.is_cpu and dtype is torch.bfloat16 and torch.is_grad_enabled() and query.requires_grad):
        return attend(module, query, key, value, mask, **options)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        y, weights = attend(module, query.float(), key.float(), value.float(), mask, **options)
    return y.to(dtype), weights


def check_dtype(name: str | None) -> None:
    """Raise ValueError for another name than those that `cast` knows."""
    if name not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}.")


def cast(model: ModelT, name: str | None) -> ModelT:
    """The model in the dtype of that name; as it is for None. Packed weights stay packed."""
    return model if name is None else model.to(DTYPES[name])
