"""The pruning benchmark runs from end to end on a tiny model, and goes on where it stopped."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_model
from transformers import BertTokenizerFast

from hf_compress.pruning.targets import StructureTimes
from hf_compress.shrinking.times import MeasuredTimes

SCRIPTS = Path(__file__).parents[1] / "scripts"
WORDS = ["good", "bad", "a", "film", "very", "not", "the", "plot"]


def write_model_and_data(folder):
    model = tiny_model("bert", num_hidden_layers=6, intermediate_size=64, max_position_embeddings=64)
    model.save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8"
    )
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        with (folder / "data" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            words = ("good", "bad") * (80 if split == "train" else 8)  # steps enough for a schedule
            writer.writerows([[f"a very {word} film", int(word == "good")] for word in words])


@pytest.mark.long
def test_every_run_is_recorded_once(tmp_path):
    write_model_and_data(tmp_path)
    command = [
        sys.executable, str(SCRIPTS / "benchmarks/pruning.py"), "--data", str(tmp_path / "data"), "--seeds", "0",
        "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for _ in range(2):
        subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = {line["run"]: line for line in lines}
    assert len(runs) == len(lines) == 14
    assert runs["heads-50"]["parameters"] < runs["heads-40"]["parameters"] < runs["teacher"]["parameters"]
    assert runs["half-alone"]["parameters"] == runs["half-distilled"]["parameters"]
    assert runs["blocks-16-75"]["sparsity"] == 0.75
    assert runs["blocks-16-75"]["stored_bytes"] < 0.5 * runs["blocks-16-75"]["matrix_bytes"]
    assert (
        max(runs[run]["parameters"] for run in ("heads-67", "neurons-75", "layers-50")) < runs["teacher"]["parameters"]
    )


@pytest.mark.long
def test_the_cost_of_a_step_is_printed_for_every_callback(tmp_path):
    write_model_and_data(tmp_path)
    command = [
        sys.executable, str(SCRIPTS / "benchmarks/pruning_step.py"), "--data", str(tmp_path / "data"),
        "--model", str(tmp_path / "model"), "--turns", "1", "--steps", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    printed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    facts = json.loads(printed)
    assert all(low <= median <= high for low, median, high in (facts["heads"], facts["blocks, taylor"]))


def test_the_ways_to_cut_a_structure_have_one_time(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    from structures import cuts

    parts = StructureTimes(fixed=1.0, heads=0.5, neurons=1.0, rest=0.25)
    times, of_two = MeasuredTimes(20.0, parts, "this one"), parts.of(2)
    ways = cuts(times, 6, 2, 3)
    assert {ways[way]["milliseconds"] for way in ("as shrink", "by importance", "evenly")} == {of_two}
    assert [ways[way].get("num_layers") for way in ("as shrink", "by importance", "evenly")] == [3, None, 6]
    assert parts.of(6 - round(6 * ways["whole layers"]["layers"])) == of_two
    assert cuts(times, 6, 2, None)["as shrink"] == ways["by importance"]


@pytest.mark.long
def test_one_speed_had_in_four_ways_is_compared(tmp_path):
    pytest.importorskip("openvino")
    write_model_and_data(tmp_path)
    command = [
        sys.executable, str(SCRIPTS / "benchmarks/structures.py"), "--data", str(tmp_path / "data"),
        "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--layers", "3", "--tokens", "16",
        "--seeds", "0", "1", "--epochs", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    printed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    assert all(way in printed for way in ("as shrink", "by importance", "evenly", "whole layers"))
    assert "points (" in printed.splitlines()[-1] and " less " in printed.splitlines()[-1]
    assert (tmp_path / "out" / "report.html").is_file()
