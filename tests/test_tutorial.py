"""docs/tutorial.md from its first line to its last, as a reader types it; a tiny model is called bert-base-uncased."""

import re
import shlex
import sys
import threading
import types
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from recipe_run import reviews, tiny_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hf_compress as hfc
from hf_compress.commands.main import main

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
FEW = {  # verb -> what makes it short here
    "run": [f"--set={stage}.{option}" for stage in ("teacher", "student")
            for option in ("max_steps=4", "learning_rate=1e-3", "use_cpu=true", "bf16=false")]
    + [f"--set=evaluate.{option}" for option in ("latency_rounds=2", "throughput_rounds=2", "isolate=false")],
    "compare": ["--latency_rounds=2", "--throughput_rounds=2", "--sequence_length=8", "--isolate=false"],
}  # fmt: skip


def blocks():
    """(language, text) of every block, in order."""
    return re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def expanded(word):
    return map(str, Path().glob(word)) if "*" in word else [word]


def served(code, server):
    """Run serve.py in a module of its own, and its handler in a thread, on a port that is free."""
    module = types.ModuleType("serve")
    sys.modules["serve"] = module
    exec(code, module.__dict__)
    server.append(ThreadingHTTPServer(("127.0.0.1", 0), module.Handler))
    threading.Thread(target=server[0].serve_forever, daemon=True).start()
    return module


@pytest.fixture
def serve():
    """Runs the blocks of Python of the page in order; returns the server's module, and what the client printed."""
    servers = []

    def run(capsys):
        module, said = None, ""
        for text in (text for language, text in blocks() if language == "python"):
            if "Handler" in text:
                module = served(text, servers)
                continue
            capsys.readouterr()
            exec(text.replace("127.0.0.1:8000", f"127.0.0.1:{servers[0].server_address[1]}"), {})
            said = capsys.readouterr().out
        return module, said

    yield run
    for one in servers:
        one.shutdown()
        one.server_close()


def check(module, said, folder):
    assert said.count("'label': 'neg'") + said.count("'label': 'pos'") == 2
    texts = ["the film was good a", "the film was bad b"]
    known = pipeline("text-classification", model=str(folder), device="cpu")
    assert [one["label"] for one in module.labels(texts)] == [one["label"] for one in known(texts)]


def test_the_server_of_the_tutorial_answers(serve, tmp_path, monkeypatch, capsys):
    """Its last step alone; the whole page is in the long suite."""
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder(tmp_path / "model", initializer_range=0.3)
    model = hfc.quantize(AutoModelForSequenceClassification.from_pretrained(folder), bits=8)
    hfc.export(model, "served", format="openvino", tokenizer=AutoTokenizer.from_pretrained(folder))
    check(*serve(capsys), folder)


@pytest.mark.long
def test_the_tutorial_runs_from_its_first_line_to_its_last(serve, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "bert-base-uncased")
    file, ran = reviews(tmp_path / "reviews.csv"), []
    file.write_text(file.read_text(encoding="utf-8") + "the film was not bad,\n" * 20, encoding="utf-8")
    for text in (text for language, text in blocks() if language == "bash"):
        _, verb, *words = [path for word in shlex.split(text) for path in expanded(word)]
        assert main([verb, *words, *FEW.get(verb, [])]) == 0, capsys.readouterr().err
        ran.append(verb)
    assert ran == ["doctor", "run", "shrink", "convert", "compare"]
    assert {"report.html", "report.json"} <= {path.name for path in (tmp_path / "report").iterdir()}
    check(*serve(capsys), tmp_path / "runs" / "reviews" / "model")
