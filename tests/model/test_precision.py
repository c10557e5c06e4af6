"""Where bfloat16 pays: what the processor has, under the caps of oneDNN."""

import pytest
import torch

from hf_compress.model import precision


@pytest.mark.parametrize(
    ("cap", "has"),
    [("", True), ("avx512_core_bf16", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_VNNI", False),
     ("avx512_core", False), ("AVX2", False), ("avx2_vnni", False)],
)  # fmt: skip
def test_caps_of_onednn_are_those_of_the_processor(cap, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "is_x86_with_onednn", lambda: True)
    monkeypatch.setenv(precision.CAP, cap)
    assert precision.cpu_has_bfloat16.__wrapped__() is has


@pytest.mark.parametrize(("bf16", "amx"), [(True, False), (False, True), (False, False)])
def test_either_unit_makes_bfloat16_fast(bf16, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision, "is_x86_with_onednn", lambda: True)
    monkeypatch.delenv(precision.CAP, raising=False)
    assert precision.cpu_has_bfloat16.__wrapped__() is (bf16 or amx)


def test_other_devices_are_not_taken_for_fast():
    assert not precision.has_fast_bfloat16(torch.device("mps")) and not precision.has_fast_bfloat16(
        torch.device("meta")
    )
