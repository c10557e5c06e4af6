"""The checks of the engines run from end to end on a tiny case, and refuse a wrong or slow result."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import hf_compress as hfc
from tests.helpers import tiny_model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_route_is_checked(capsys, monkeypatch):
    check = script("checks/engines")
    monkeypatch.setattr(check, "CACHE_BYTES", 1)
    monkeypatch.setattr(check, "SECONDS", dict.fromkeys((True, False), 1e-4))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(
        check, "run_capped", lambda cap, args: list(check.check((192, 128), [1, 20], [torch.float32], short=True))
    )
    monkeypatch.setattr(check, "SLOWEST", 1e9)
    check.check_caps(argparse.Namespace(caps=["none"], short=True))
    printed = capsys.readouterr().out
    assert "every error is within its bound" in printed
    assert all(name in printed for name in [*check.SCHEMES, "blocks of 16", "a quarter of the rank"])
    monkeypatch.setattr(check, "SLOWEST", 1e-9)
    with pytest.raises(SystemExit, match="times stock's time"):
        check.check_caps(argparse.Namespace(caps=["none"], short=True))


def test_a_wrong_product_is_told():
    check = script("checks/engines")
    row = {
        "layer": "l",
        "shape": [4, 4],
        "tokens": 1,
        "dtype": "float32",
        "runs": "float32",
        "ratio": 1.0,
        "bound": 1e-6,
    }
    assert check.report("none", [{**row, "error": 1e-7}]) == []
    for error in (1e-3, float("nan")):
        assert "an error of" in check.report("none", json.loads(json.dumps([{**row, "error": error}])))[0]


def test_models_are_timed_beside_stock_ones(tmp_path, capsys):
    benchmark = script("benchmarks/model_cpu")
    tiny_model("bert", hidden_size=64, intermediate_size=256).save_pretrained(tmp_path / "classifier")
    packed = hfc.quantize(tiny_model("bert", hidden_size=64, intermediate_size=256), 8, embedding_bits=8)
    packed.save_pretrained(tmp_path / "packed")
    tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=256).save_pretrained(tmp_path / "decoder")
    options = dict(batches=[2], lengths=[8], rounds=1, threads=torch.get_num_threads(), prompt=4,
                   new_tokens=3, compiled=False, halved=True, widths=["8 bit rows", "4 bit"],
                   compressed=tmp_path / "packed")  # fmt: skip
    with torch.no_grad():
        times = benchmark.classification(argparse.Namespace(model=tmp_path / "classifier", **options))
        times |= benchmark.generation(argparse.Namespace(model=tmp_path / "decoder", **options))
    assert list(times) == ["batch 2 length 8", "prompt of 4, 3 new tokens"]
    assert all("4 bit, float32" in cell for cell in times.values())
    assert str(tmp_path / "packed") in times["batch 2 length 8"]
    benchmark.report(times)
    assert "x float32" in capsys.readouterr().out
