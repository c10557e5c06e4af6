"""Verbs agree: each takes what another wrote, asks for no more than it reads, and says alike what is not there."""

import json
import re
import shutil

import pytest
import torch
from recipe_run import reviews, tiny_folder
from safetensors.torch import load_file, save_file
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


def changed_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def only(folder, name, content=b"x"):
    shutil.rmtree(folder)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(content)


def weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(tensors):
    name = next(name for name in tensors if "layer.1" in name)
    return {**tensors, name: tensors[name] * float("nan")}


def index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


NO_MODELS = {  # what happened to a folder -> what is said
    "adapter": (lambda f: only(f, "adapter_config.json", b"{}"), "It is an adapter of PEFT: merge it into its model"),
    "gguf": (lambda f: only(f, "model.gguf"), "A GGUF file is of llama.cpp and is not read here"),
    "deeper": (lambda f: only(f, "0_Transformer/config.json"), "Did you mean .*0_Transformer?"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json in it"),
    "torn config": (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "config.json cannot be read"),
    "timm": (lambda f: (f / "config.json").write_text('{"architecture": "x"}', encoding="utf-8"), "no model_type"),
    "newer": (lambda f: changed_config(f, model_type="zzz"), "model_type 'zzz', which Transformers .* does not know"),
    "own code": (lambda f: changed_config(f, model_type="zzz", auto_map={}), "runs code of its own"),
    "one class": (lambda f: changed_config(f, architectures="Bert"), "must name a list of classes"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither safetensors nor the graph of an export"),
    "torn": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 20), "is damaged, or not wholly there"),
    "pointer": (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"),
                "is a pointer of Git LFS"),
    "a shard": (lambda f: index(f, '{"weight_map": {"a": "b.safetensors"}}'),
                "lacks b.safetensors, one of 1 files"),
    "torn index": (lambda f: index(f, '{"weight_'), "index.json names no files: it is damaged"),
    "an index of nothing": (lambda f: index(f, "[]"), "index.json names no files: it is damaged"),
    "a list of files": (lambda f: index(f, '{"weight_map": ["a"]}'), "index.json names no files: it is damaged"),
}  # fmt: skip
HALF = {
    "a layer less": (lambda f: weights(f, lambda t: {n: x for n, x in t.items() if "layer.1" not in n}),
                     r"is in none of the files of .* \(\d+ such weights\)"),
    "no head": (lambda f: weights(f, lambda t: {n: x for n, x in t.items() if "classifier" not in n}),
                "classifier.bias is in none of the files"),
    "not a number": (lambda f: weights(f, not_a_number), "holds NaN or infinity"),
    "another shape": (lambda f: changed_config(f, id2label={0: "a", 1: "b", 2: "c"}), "have other shapes than"),
}  # fmt: skip


def said_of(model, change, verb, tmp_path, capsys):
    """What a verb says of a changed copy of a model, in one line behind what was read of the data."""
    folder = tmp_path / "changed"
    shutil.copytree(model, folder)
    change(folder)
    output = tmp_path / "out"
    data = ["--data", str(reviews(tmp_path / "reviews.csv"))]
    command = {
        "quantize": ["--model", folder, "--output", output],
        "prune": ["--model", folder, *data, "--heads", "0.5", "--output", output],
        "evaluate": [folder, *data, "--output", output],
        "convert": [folder, output, "--format", "plain"],
        "picture": [folder, "--output", tmp_path / "layers.svg"],
        "shrink": [folder, *data, "--size_mb", "1", "--output", output, "--plan"],
    }[verb]
    assert main([verb, *map(str, command)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-compress: ")]
    assert len(said) == 1
    return said[0], output


@pytest.mark.parametrize("verb", ["quantize", "evaluate", "convert", "picture", "shrink"])
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_is_told_before_anything_is_written(kind, verb, model, tmp_path, capsys):
    change, message = NO_MODELS[kind]
    said, output = said_of(model, change, verb, tmp_path, capsys)
    assert re.search(message, said), said
    assert not output.exists()


@pytest.mark.parametrize("verb", ["quantize", "prune", "evaluate", "convert"])
@pytest.mark.parametrize("kind", HALF)
def test_weights_that_no_file_has_are_never_made_up(kind, verb, model, tmp_path, capsys):
    change, message = HALF[kind]
    said, _ = said_of(model, change, verb, tmp_path, capsys)
    assert re.search(message, said) or (kind == "another shape" and "predicts the labels" in said), said


def test_a_folder_without_tokenizer_is_told_before_anything_is_written(model, tmp_path, capsys):
    def without(folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()

    said, output = said_of(model, without, "quantize", tmp_path, capsys)
    assert "has no tokenizer beside the model" in said and not output.exists()


def test_a_class_that_transformers_lacks_is_named(model, tmp_path, capsys):
    said, _ = said_of(model, lambda f: changed_config(f, architectures=["ZzzForSequenceClassification"]), "evaluate",
                      tmp_path, capsys)  # fmt: skip
    assert "names the class ZzzForSequenceClassification, which Transformers does not have" in said


@pytest.mark.parametrize("word", ["=x", "a=", "a=x,"])
def test_a_name_without_a_model_and_a_model_without_a_name(word, capsys):
    assert main(["compare", word, "--data", "reviews.csv"]) == 2
    assert "A model is named as NAME=MODEL" in capsys.readouterr().err


def test_what_a_run_wrote_is_trained_on_and_shrunk(model, tmp_path, capsys):
    run, data = tmp_path / "run", ["--data", str(reviews(tmp_path / "reviews.csv"))]
    train = ["--max_steps", "1", "--use_cpu", "true"]
    first = ["distill", "--model", str(model), "--num_hidden_layers", "2", *data, *train, "--output", str(run)]
    assert main(first) == 0, capsys.readouterr().err
    again = ["distill", "--model", str(run), "--teacher", str(run), *data, *train, "--output", str(tmp_path / "again")]
    assert main(again) == 0, capsys.readouterr().err
    assert main(["shrink", str(run), *data, "--size_mb", "1", "--output", str(tmp_path / "s"), "--plan"]) == 0
