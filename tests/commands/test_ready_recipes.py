"""Recipes that come with the package run from end to end, as a user would run them, on tiny models."""

import json
import random

import pytest
import torch
from recipe_run import TRAIN, reviews, tiny_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compress.commands.main import main

EVALUATE = {"latency_rounds": 2, "throughput_rounds": 2, "sequence_length": 8, "isolate": "false"}


def run(name, folder, output, data, changes, capsys):
    settings = {f"evaluate.{name}": value for name, value in EVALUATE.items()} | changes
    words = [word for option, value in settings.items() for word in ("--set", f"{option}={str(value).lower()}")]
    command = ["run", name, "--model", str(folder), "--data", str(data), "--output", str(output), *words]
    assert main([*command, "--max-length", "16"]) == 0, capsys.readouterr().err
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert (output / "report.html").is_file() and "| model |" in capsys.readouterr().out
    return report["entries"]


@pytest.fixture
def texts(tmp_path):
    words = random.Random(0).choices(["good", "bad", "film", "the", "was", "not", *"abcdefghij"], k=2000)
    lines = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "texts.txt"


EVEN, MIXED = ("llm-4bit", {}, 8.5), ("llm-3bit-mixed", {"gptq.sensitivity_examples": 4}, 8.5)


@pytest.mark.parametrize("name, changes, most, width, group", [
    (*EVEN, 64, 64), (*MIXED, 96, 32), (*EVEN, 40, -1),
    *(pytest.param(*one, marks=pytest.mark.long) for one in ((*MIXED, 64, 64), (*EVEN, 96, 32), (*MIXED, 40, -1))),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_language_model_in_few_bits(name, changes, most, width, group, texts, tmp_path, capsys):
    """Any width finds its groups, and the tables are packed too: the bits a weight are near those that are promised."""
    sizes = dict(hidden_size=width, intermediate_size=width, num_attention_heads=4, head_dim=width // 4)
    folder = tiny_folder(tmp_path / "llama", "llama", num_hidden_layers=2, **sizes)
    few = {"gptq.calibration_examples": 8, **changes}
    start, packed = run(name, folder, tmp_path / "out", texts, few, capsys)
    assert start["measurement"]["bits_per_weight"] == pytest.approx(32, abs=0.01)
    assert packed["measurement"]["bits_per_weight"] < most  # norms stay, and of such thin tables scales are a part
    # a random model gives each of 64 tokens about the same probability, and still does when it is rounded
    assert packed["quality"] == pytest.approx(start["quality"], abs=0.2) and -4.4 < start["quality"] < -3.9
    record = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.quantization_config
    tables = {name for name in record["bits"] if name.endswith("embed_tokens")}
    assert len(tables) == 1 and all(record["bits"].pop(name)["bits"] == 8 for name in tables)
    bits = {entry["bits"] for entry in record["bits"].values()}
    assert bits == {4} if name == "llm-4bit" else len(bits) > 1
    assert {entry.get("group_size", -1) for entry in record["bits"].values()} == {group}


@pytest.mark.parametrize("name, bits, group", [("llm-3bit", 3, 64), ("llm-2bit", 2, 32)], ids=["llm-3bit", "llm-2bit"])
def test_a_language_model_whose_scales_follow_the_float_model(name, bits, group, texts, tmp_path, capsys):
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=16)
    folder = tiny_folder(tmp_path / "llama", "llama", num_hidden_layers=1, **sizes)
    changes = {"gptq.calibration_examples": 8, "distil.max_steps": 2, "distil.disable_tqdm": True, "distil.bf16": False}
    start, packed = run(name, folder, tmp_path / "out", texts, changes, capsys)
    assert packed["quality"] == pytest.approx(start["quality"], abs=0.2)
    record = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.quantization_config["bits"]
    layers = {(entry["bits"], entry["group_size"]) for key, entry in record.items() if not key.endswith("embed_tokens")}
    assert layers == {(bits, group)} and len(record) == 8


def test_an_encoder_of_sparse_blocks(tmp_path, capsys):
    training = {f"{stage}.{name}": value for stage in ("fine-tune", "distil") for name, value in TRAIN.items()}
    changes = {**training, "prune.num_updates": 2, "prune.end": 0.7}
    data = reviews(tmp_path / "r.csv")
    tuned, sparse = run("sparse-blocks", tiny_folder(tmp_path / "bert"), tmp_path / "out", data, changes, capsys)
    assert sparse["measurement"]["sparsity"].get("dropped_blocks", 0) > 0, "what is left of cut matrices has holes"
    assert sparse["measurement"]["parameters"] < tuned["measurement"]["parameters"] and tuned["name"] == "fine-tune"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.quantization_config["sparsity"]


def test_a_classifier_distilled_pruned_and_rounded_at_once(tmp_path, capsys):
    training = {f"{stage}.{name}": value for stage in ("fine-tune", "distil") for name, value in TRAIN.items()}
    changes = training
    model = tiny_folder(tmp_path / "bert")
    reviewed = reviews(tmp_path / "r.csv")
    tuned, _, small = run("classifier-cpu-together", model, tmp_path / "out", reviewed, changes, capsys)
    assert small["measurement"]["bits_per_weight"] < 16 < tuned["measurement"]["bits_per_weight"]
    assert small["measurement"]["parameters"] < tuned["measurement"]["parameters"] / 2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 2
    record = model.config.quantization_config
    assert record["structure"] and {entry["bits"] for entry in record["bits"].values()} == {4, 8}
