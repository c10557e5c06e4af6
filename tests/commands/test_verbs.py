"""Verbs agree: each takes what another wrote, asks for no more than it reads, and says alike what is not there."""

import json

import pytest
import torch
from recipe_run import reviews, tiny_folder
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.commands.main import main


@pytest.fixture
def model(tmp_path):
    return tiny_folder(tmp_path / "model")


def loaded(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def assert_same_weights(one, other):
    for (name, mine), (_, theirs) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


def test_rounding_to_nearest_asks_for_no_texts(model, tmp_path, capsys):
    command = ["quantize", "--bits", "4", "--embedding_bits", "8", "--model", str(model)]
    assert main([*command, "--output", str(tmp_path / "o")]) == 0, capsys.readouterr().err
    assert_same_weights(loaded(tmp_path / "o" / "model"), hfc.quantize(loaded(model), bits=4, embedding_bits=8))


def test_whole_layers_go_without_texts(model, tmp_path, capsys):
    command = ["prune", "--method", "structure", "--layers", "0.5", "--model", str(model)]
    assert main([*command, "--output", str(tmp_path / "o")]) == 0, capsys.readouterr().err
    assert loaded(tmp_path / "o" / "model").config.num_hidden_layers == 2


def test_without_texts_a_model_needs_a_head_that_says_its_task(tmp_path, capsys):
    """A fresh head would be rounded, and saved."""
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForPreTraining"]}), encoding="utf-8"
    )
    assert main(["quantize", "--model", str(folder), "--output", str(tmp_path / "o")]) == 2
    assert "has no head for labels: say the --task" in capsys.readouterr().err


READERS = [["--method", "gptq"], ["--average_bits", "3.5"], ["--evaluate"]]


@pytest.mark.parametrize("more", READERS, ids=" ".join)
def test_what_reads_texts_asks_for_them(more, model, tmp_path, capsys):
    assert main(["quantize", "--model", str(model), "--output", str(tmp_path / "o"), *more]) == 2
    assert "The recipe names no data" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_a_run_wrote_is_a_model_for_every_verb(model, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["quantize", "--bits", "8", "--model", str(model), "--output", str(run)]) == 0, capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "plain"), "--format", "plain"]) == 0, capsys.readouterr().err
    assert main(["picture", str(run), "--output", str(tmp_path / "layers.svg")]) == 0, capsys.readouterr().err
    assert_same_weights(loaded(tmp_path / "plain"), loaded(run / "model").dequantize())


def test_a_picture_that_would_not_be_what_its_name_says_is_refused(model, tmp_path, capsys):
    assert main(["picture", str(model), "--output", str(tmp_path / "layers.png")]) == 2
    assert "layers.svg, not" in capsys.readouterr().err and not (tmp_path / "layers.png").exists()


VERBS = {"convert": ["{}", "o"], "picture": ["{}"], "evaluate": ["{}", "--data", "reviews.csv"],
         "compare": ["{}", "--data", "reviews.csv"], "quantize": ["--model", "{}", "--output", "o"]}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("folder", ["./gone", "runs/gone/model", "gone/"])
def test_a_folder_that_is_not_there_is_one_sentence(folder, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path / "reviews.csv")
    assert main([verb, *(word.format(folder) for word in VERBS[verb])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-compress: ") and "There is no model" in said and said.count("\n") == 1
