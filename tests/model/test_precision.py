"""Where bfloat16 pays: what the processor has, who made it, under the caps of oneDNN."""

import pytest
import torch

from hf_compress.model import precision

AMD, INTEL, WITHOUT_AMX = {"amd": True}, {"amx": True}, {"amd": False}  # each has AVX512_BF16
PROCESSORS = {"AMD": AMD, "Intel with AMX": INTEL, "Intel without AMX": WITHOUT_AMX, "older": {"bf16": False}}


def pays(monkeypatch, *, cap: str = "", bf16: bool = True, amx: bool = False, amd: bool = False) -> bool:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision, "is_amd", lambda: amd)
    monkeypatch.setattr(precision, "is_x86_with_onednn", lambda: True)
    monkeypatch.setenv(precision.CAP, cap)
    return precision.cpu_has_bfloat16.__wrapped__()


@pytest.mark.parametrize(
    ("cap", "on_amd", "on_intel"),
    [("", True, True), ("avx512_core_bf16", True, False), ("AVX512_CORE_FP16", True, False),
     ("AVX512_CORE_AMX", True, True), ("AVX512_CORE_VNNI", False, False), ("avx512_core", False, False),
     ("AVX2", False, False), ("avx2_vnni", False, False)],
)  # fmt: skip
def test_caps_of_onednn_are_those_of_the_processor(cap, on_amd, on_intel, monkeypatch):
    assert pays(monkeypatch, cap=cap, **AMD) is on_amd and pays(monkeypatch, cap=cap, **INTEL) is on_intel
    assert not pays(monkeypatch, cap=cap, **WITHOUT_AMX)


@pytest.mark.parametrize("name", PROCESSORS)
def test_bfloat16_pays_by_amx_and_on_amd(name, monkeypatch):
    """Intel's AVX512_BF16 takes twice the time of float32 (86 and 160 GFLOP/s, Emerald Rapids whose AMX is hidden)."""
    assert pays(monkeypatch, **PROCESSORS[name]) is (name in ("AMD", "Intel with AMX"))


def test_other_devices_are_not_taken_for_fast():
    assert not precision.has_fast_bfloat16(torch.device("mps")) and not precision.has_fast_bfloat16(
        torch.device("meta")
    )
