"""scripts/benchmarks/embedder.py, on a tiny embedder: its figures are those of what it saved."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from recipe_run import embedder

from hf_compress.model.pooling import Pooling, read_vectors

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmarks" / "embedder.py"


@pytest.mark.long
def test_students_of_an_embedder_are_held_against_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    texts = tmp_path / "texts.txt"
    lines = [f"the film was good bad {a} {b}. not the film" for a in "abcdefghij" for b in "abcdefghij"]
    texts.write_text("\n".join(lines), encoding="utf-8")
    (more := tmp_path / "more.txt").write_text("the film was bad good. film\n" * 10, encoding="utf-8")  # learned alone
    words = {"model": embedder(tmp_path, pooling=Pooling("cls")), "output": tmp_path / "out",
             "max_steps": 2, "batch_size": 4, "rounds": 2, "tokens": 8}  # fmt: skip
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--texts", str(texts), str(more), "--layers", "2", "1",
                                      "--runtime", "openvino", "--hints", "skip"])  # fmt: skip
    spec = importlib.util.spec_from_file_location("embedder_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    figures = json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))
    names = ["2 layers", "1 layers"]
    assert set(figures) == {"teacher", *names, *(f"{name}, 8 bit, openvino" for name in names)}
    assert figures["teacher"]["spearman"] == pytest.approx(1) and figures["teacher"]["recall@10"] == 1
    assert read_vectors(tmp_path / "out" / "2-layers") == (Pooling("cls"), None)
    module.main()  # what is there is kept
    assert "100 pieces to learn from, 10 held out" in capsys.readouterr().out
