"""Files from strangers: what is damaged or hostile is refused by name, and nothing of it is run or believed."""

import inspect
import json
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from machine import needs_proc
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, core_model_loading

import hf_compress as hfc
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme

pytest.importorskip("resource", reason="scripts/checks/fuzz.py bounds what it runs: not on Windows")
from scripts.checks.fuzz import CHECKPOINTS, Bomb, bert, fuzz_apart  # noqa: E402

# Transformers 5.17 gives a head of other labels the file's shape, for any quantized model
MAKES_NEW_HEADS = "param_needs_quantization(model, target_name)" in inspect.getsource(core_model_loading)

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path):
    hfc.quantize(bert(), {QUERY: 4}, group_size=16).save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return type(bert()).from_pretrained(folder)


def rewrite(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def without(name):
    return lambda tensors: tensors.pop(name)


def instead(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


DAMAGES = {
    "packed-tensor-missing": (without(f"{QUERY}.qweight"), f"{QUERY}.qweight is in none of the checkpoint"),
    "bias-missing": (without(f"{QUERY}.bias"), "query.bias is in none of the checkpoint"),
    "plain-tensor-missing": (without("bert.pooler.dense.weight"), "pooler.dense.weight is in none of the"),
    "head-missing": (without("classifier.weight"), "classifier.weight is in none of the checkpoint"),
    "words-as-floats": (instead(f"{QUERY}.qweight", torch.Tensor.float), "must hold torch.int32, but is F32"),
    "weight-as-integers": (instead("bert.pooler.dense.bias", torch.Tensor.int), "must hold torch.float32, but is I32"),
    "another-shape": (
        instead(f"{QUERY}.scales", lambda t: torch.cat([t, t])),
        r"has the shape \[2, 32\] by config.json, and \[4, 32\]",
    ),
    "nan": (instead("bert.pooler.dense.bias", lambda t: t * float("nan")), "pooler.dense.bias holds NaN or infinity"),
    "infinity": (instead("classifier.weight", lambda t: t / 0), "classifier.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("change, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tensor_is_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_size_is_believed_only_if_the_file_has_it(folder):
    """A table of 32 TB by config.json: refused by the header, before anything of that size is made."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = 2**38
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"word_embeddings.weight has the shape \[274877906944, 32\] by config.json"):
        load(folder)


def test_what_another_task_adds_may_be_new(folder):
    assert isinstance(BertForMaskedLM.from_pretrained(folder).get_submodule(QUERY), PackedLinear)
    with nullcontext() if MAKES_NEW_HEADS else pytest.raises(ValueError, match=r"classifier.*cannot make it anew"):
        again = type(bert()).from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
        assert again.classifier.weight.shape == (5, 32)


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "cut"])
def test_only_whole_safetensors_are_read(folder, is_whole):
    file = folder / "model.safetensors"
    if is_whole:
        file.unlink()
        torch.save(Bomb(folder / "ran"), folder / "pytorch_model.bin")
        message = "safetensors files only"
    else:
        file.write_bytes(file.read_bytes()[:-5])
        message = "no whole safetensors file"
    with pytest.raises(ValueError, match=message):
        load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("entry", [
    {"bits": 4.0}, {"bits": True}, {"bits": 4, "symmetric": "false"}, {"bits": 4, "desc_act": 1},
    {"bits": 4, "group_size": True}, {"bits": 4, "num_levels": 4.0},
    {"bits": 8, "activation_bits": 8, "activation_range": 5},
    {"bits": 8, "activation_bits": 8, "activation_range": [-1.0, float("inf")]},
    {"bits": 8, "activation_bits": 8, "activation_range": ["a", "b"]}, {"bits": 4, "scale_dtype": ["float16"]},
], ids=str)  # fmt: skip
def test_a_scheme_of_the_wrong_type_is_refused(entry):
    with pytest.raises(ValueError, match="The record of layer is not valid"):
        WeightScheme.from_dict(entry, "layer")


@pytest.mark.parametrize("layers", [
    {"keep": {}}, {"config": {}}, {"config": {"num_hidden_layers": 10**6}, "keep": {}},
    {"config": {"layer_types": ["x"] * 3}, "keep": {}},
], ids=["no-config", "no-keep", "a-million-layers", "unknown-types"])  # fmt: skip
def test_layers_that_cannot_be_built_are_refused(layers, tmp_path):
    model = CHECKPOINTS["layers"]()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["structure"]["layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="structure: "):
        type(model).from_pretrained(tmp_path)


def test_a_huge_group_index_is_refused_without_counting_up_to_it(folder):
    """It used to take 17 GB."""
    layer = load(folder).get_submodule(QUERY)
    layer.g_idx = torch.full((32,), 2**31 - 1, dtype=torch.int32)
    with mock.patch("torch.bincount", side_effect=MemoryError), pytest.raises(ValueError, match="g_idx must lie in"):
        layer.check("layer")


@needs_proc
def test_five_hundred_damaged_checkpoints_load_right_or_not_at_all():
    ends, complaints = fuzz_apart(range(500), seed=1)
    assert not complaints, "\n".join(f"{number}: {text}" for number, text in complaints.items())
    assert sum(ends.values()) == 500
    assert sum(count for end, count in ends.items() if end.endswith(" loads")) > 50


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_damaged_checkpoints_load_right_or_not_at_all(part):
    """In processes of their own: a crash would be seen."""
    for first in (part * 500, part * 500 + 250):
        ends, complaints = fuzz_apart(range(first, first + 250), seed=0)
        assert not complaints, "\n".join(f"{number}: {text}" for number, text in complaints.items())
        assert sum(ends.values()) == 250
