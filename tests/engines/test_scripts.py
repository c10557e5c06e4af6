"""The CPU benchmarks run from end to end on a tiny case, and refuse a wrong result."""

import argparse
import importlib.util
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


@pytest.mark.parametrize("what", ["linear", "sparse"])
def test_layers_are_timed_and_tabled(what, capsys, monkeypatch):
    benchmark = script("benchmark_cpu")
    args = argparse.Namespace(what=what, shapes=["192x256"], tokens=[1, 8], bits=[3, 8], blocks=[16], densities=[0.2],
                              threads=torch.get_num_threads(), cold=True, rounds=2, family="torch")  # fmt: skip
    monkeypatch.setattr(benchmark, "COLD_BYTES", 1 << 17)  # two copies
    results = benchmark.run_family(args)
    assert len(results) == (4 if what == "linear" else 2)
    rows = benchmark.table([results, results])
    assert all(row["us"]["hf_compress"] > 0 and row["noisy"] == [] for row in rows)
    benchmark.report(rows)
    assert "geometric mean" in capsys.readouterr().out


def test_a_wrong_result_stops_the_benchmark():
    benchmark = script("benchmark_cpu")
    weight = torch.randn(4, 8)
    wrong = [[("broken", lambda x: x @ weight.t() * 1.1, weight.double())]]
    with pytest.raises(SystemExit, match="broken is wrong"):
        benchmark.measure(wrong, 2, argparse.Namespace(threads=1, rounds=1))


def test_models_are_timed_beside_stock_ones(tmp_path, capsys):
    benchmark = script("benchmark_model_cpu")
    tiny_model("bert", hidden_size=64, intermediate_size=256).save_pretrained(tmp_path / "classifier")
    packed = hfc.quantize(tiny_model("bert", hidden_size=64, intermediate_size=256), 8, embedding_bits=8)
    packed.save_pretrained(tmp_path / "packed")
    tiny_model("llama", hidden_size=64, head_dim=16, intermediate_size=256).save_pretrained(tmp_path / "decoder")
    options = dict(family="torch", data=None, batches=[2], lengths=[8], rounds=1, threads=torch.get_num_threads(),
                   prompt=4, new_tokens=3, compiled=False, compressed=tmp_path / "packed", peers=True)  # fmt: skip
    with torch.inference_mode():
        times = benchmark.classification(argparse.Namespace(model=tmp_path / "classifier", **options))
        times |= benchmark.generation(argparse.Namespace(model=tmp_path / "decoder", **options))
    assert list(times) == ["batch 2 length 8", "prompt of 4, 3 new tokens"]
    assert all("hf_compress 4 bit, bfloat16" in cell for cell in times.values())
    assert f"{tmp_path / 'packed'}, bfloat16" in times["batch 2 length 8"]
    benchmark.report([times])
    assert "x float32" in capsys.readouterr().out
