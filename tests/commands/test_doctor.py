"""`hf-compress doctor` says what runs here: held against what packed layers do, and against the pinned versions."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

import hf_compress as hfc
from hf_compress.commands import doctor
from hf_compress.commands.main import main
from hf_compress.engines import processor
from hf_compress.layers.packed_module import routes_of

ROOT = Path(__file__).parents[2]


def said(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    return shown


@pytest.mark.parametrize("mode", processor.MODES)
@pytest.mark.parametrize("bits, row", [(8, "8 bit, groups"), (4, "4 bit"), (3, "3 bit"), (2, "2 bit")])
def test_what_would_run_is_what_runs(bits, row, mode, capsys, monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, mode)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    model = hfc.quantize(tiny_model("bert", **sizes), bits=bits, group_size=64).eval()
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    (runs,) = routes_of(model)
    assert re.search(rf"^  {row} +{re.escape(runs)}  ", said(capsys), re.M)


def test_without_optional_packages_it_says_how_to_get_them(capsys, monkeypatch):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", none)
    shown = said(capsys)
    for extra in doctor.EXTRAS:
        assert f"  pip install 'hf_compress[{extra}]'" in shown
    assert "openvino not installed, onnxruntime not installed, llama.cpp not installed" in " ".join(shown.split())
    assert "are served faster by a runtime" in shown


def test_another_version_than_the_tested_one_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "version", {"torch": "2.9.1+cpu", "gguf": "0.19.0"}.__getitem__)
    assert doctor.told("torch") == "torch 2.9.1 (tested: 2.13.0)" and doctor.told("gguf") == "gguf 0.19.0"
    monkeypatch.setattr(doctor, "version", {"torch": "2.13.0+cu130"}.__getitem__)
    assert doctor.told("torch") == "torch 2.13.0"


def test_the_tested_versions_are_those_that_are_pinned():
    pinned = dict(re.findall(r"^(\S+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


def test_the_extras_are_those_that_can_be_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brings = {extra: {re.match(r"[\w-]+", need)[0] for need in needs} for extra, needs
              in project["optional-dependencies"].items()}  # fmt: skip
    assert set(doctor.EXTRAS) == set(brings) - {"test", "test-core", "bench"}
    for extra, (names, _) in doctor.EXTRAS.items():
        assert set(names) <= brings[extra], extra


@pytest.mark.parametrize("name, value, advice", [
    (processor.VARIABLE, "exact", "HF_COMPRESS_CPU=exact keeps the fastest products away"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2", "ONEDNN_MAX_CPU_ISA=AVX2 holds back"),
    ("ATEN_CPU_CAPABILITY", "default", "ATEN_CPU_CAPABILITY=default holds back"),
])  # fmt: skip
def test_what_holds_the_processor_back_is_named(name, value, advice, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert advice in said(capsys)
    monkeypatch.delenv(name)
    assert advice.partition("=")[0] + "=" + value not in said(capsys)


def test_products_of_integers_that_are_not_exact_are_said(capsys, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(processor, "has_int8", lambda there=there: there)
        assert ("Products of 8-bit integers are not exact" in said(capsys)) is not there


@pytest.mark.parametrize(("fast", "amd", "advice"), [
    (True, True, "Load models with dtype=torch.bfloat16"), (False, False, "Load models in float32: without AMX"),
    (False, True, None),
])  # fmt: skip
def test_the_dtype_that_is_fast_is_said(fast, amd, advice, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_has_bfloat16", lambda: fast)
    monkeypatch.setattr(doctor, "is_amd", lambda: amd)
    monkeypatch.setattr(processor, "instructions", lambda: {"AVX512-BF16": True, "AMX": False})
    text = said(capsys)
    assert ("Load models" in text) is (advice is not None) and (advice or "") in text
