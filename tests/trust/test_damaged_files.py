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
from hf_compress.layers.low_rank import LowRank
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.packed_module import Multiplies
from hf_compress.layers.product_embedding import ProductEmbedding
from hf_compress.layers.scheme import WeightScheme

pytest.importorskip("resource", reason="scripts/checks/fuzz.py bounds what it runs: not on Windows")
from scripts.checks.checkpoints import CHECKPOINTS, bert, stored_as  # noqa: E402
from scripts.checks.damage import Bomb  # noqa: E402
from scripts.checks.fuzz import fuzz_apart  # noqa: E402

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


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    hfc.quantize(bert(), {QUERY: 4}, group_size=16).save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    first = sorted(set(content["weight_map"].values()))[0]
    (folder / first).rename(tmp_path / first)
    content["weight_map"] = {k: v.replace(first, f"../{first}") for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="names files outside its folder"):
        load(folder)


def edit(folder, change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    file.write_text(json.dumps(config), encoding="utf-8")


ENTRY = QUERY.removeprefix("bert.")
EDITS = {  # each of them gave another model, in silence
    "symmetric": (dict(bits=4), lambda r: r["bits"][ENTRY].update(symmetric=True)),
    "no-order": (dict(bits=4, desc_act=True), lambda r: r["bits"][ENTRY].pop("desc_act")),
    "no-activation-bits": (dict(bits=8, activation_bits=8), lambda r: r["bits"][ENTRY].pop("activation_bits")),
    "other-range": (
        dict(bits=8, activation_bits=8, activation_range=(-2.0, 3.0)),
        lambda r: r["bits"][ENTRY].update(activation_range=[-1, 3]),
    ),
    "not-packed": (dict(bits=4), lambda r: r["bits"].pop(ENTRY)),
}


@pytest.mark.parametrize("scheme, change", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("is_signed", [True, False], ids=["with-digest", "of-an-earlier-version"])
def test_an_edited_record_is_refused(scheme, change, is_signed, tmp_path):
    model = hfc.quantize(bert(), {QUERY: scheme["bits"], "classifier": 8}, group_size=16)
    stored_as(model, QUERY, **{name: value for name, value in scheme.items() if name != "bits"})
    model.save_pretrained(tmp_path)
    load(tmp_path)
    edit(tmp_path, change)
    if not is_signed:
        edit(tmp_path, lambda record: record.pop("digest"))
        if "activation" in str(scheme):
            return  # no tensor shows it: this is what the digest is for
    with pytest.raises(
        ValueError, match="nothing that config.json speaks of|was changed since it was written|by config.json"
    ):
        load(tmp_path)


@pytest.mark.parametrize("keep", [[0, 1], [2, 0], [1]], ids=str)
def test_other_layers_than_were_kept_are_refused(keep, tmp_path):
    """Which layers have local attention goes by their number: another model, of the same tensors."""
    model = CHECKPOINTS["layers"]()
    model.save_pretrained(tmp_path)

    def change(record):
        (name,) = record["structure"]["layers"]["keep"]
        record["structure"]["layers"]["keep"][name] = keep

    edit(tmp_path, change)
    with pytest.raises(ValueError):
        type(model).from_pretrained(tmp_path)


def test_scales_of_another_kind_of_number_than_the_record_says(folder):
    rewrite(folder, instead(f"{QUERY}.scales", torch.Tensor.float))
    with pytest.raises(ValueError, match="scales must hold torch.float16, but is F32"):
        load(folder)


@pytest.mark.parametrize("name", [f"{QUERY}.qzeros2", "bert.encoder.layer.9.output.dense.weight", "extra", "bert.x"])
def test_a_tensor_that_nothing_speaks_of_is_refused(name, folder):
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    with pytest.raises(ValueError, match=f"{name} in .* is nothing that config.json speaks of"):
        load(folder)


SENTINELS = {
    "integers": lambda t: t.to(torch.int8),
    "half": lambda t: t.half(),
    "no-row": lambda t: t[None],
    "a-number": lambda t: torch.zeros(()),
    "a-matrix": lambda t: torch.ones(32, 32),  # which would be believed by those who look
}


@pytest.mark.parametrize("change", SENTINELS.values(), ids=SENTINELS)
@pytest.mark.parametrize("kind", ["codebook", "blocks", "layers", "low rank", "llama"])
def test_what_stands_in_for_a_weight_holds_nothing(kind, change, tmp_path):
    """Nobody reads it, so anything could have stood there."""
    model = CHECKPOINTS[kind]()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.numel() <= 1]
    assert names
    rewrite(tmp_path, instead(names[0], change))
    with pytest.raises(ValueError, match=f"{names[0]} must hold nothing|has the shape"):
        type(model).from_pretrained(tmp_path)


def test_a_hundred_thousand_entries_of_another_head_are_passed_over_at_once(folder, monkeypatch):
    """It took a walk through the model for each."""
    walks = []
    walk = torch.nn.Module.named_modules
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda self, *a, **k: walks.append(1) or walk(self, *a, **k))
    load(folder)
    usual = len(walks)
    edit(folder, lambda r: (r.pop("digest"), r["bits"].update({f"other_head.{i}": {"bits": 4} for i in range(1000)})))
    walks.clear()
    load(folder)
    assert len(walks) <= usual + 5


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
@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "of others"])
def test_hundreds_of_damaged_checkpoints_load_right_or_not_at_all(foreign):
    ends, complaints = fuzz_apart(range(240), seed=1, foreign=foreign)
    assert not complaints, "\n".join(f"{number}: {text}" for number, text in complaints.items())
    assert sum(ends.values()) == 240
    assert sum(count for end, count in ends.items() if end.endswith(" loads")) > 25


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_damaged_checkpoints_load_right_or_not_at_all(part):
    """In processes of their own: a crash would be seen."""
    for first in (part * 500, part * 500 + 250):
        ends, complaints = fuzz_apart(range(first, first + 250), seed=0)
        assert not complaints, "\n".join(f"{number}: {text}" for number, text in complaints.items())
        assert sum(ends.values()) == 250


@pytest.mark.parametrize("kind", ["gpt2", "ternary", "t5", "tied parts", "packed blocks", "low rank"])
def test_what_was_not_checked_is_not_read(kind, tmp_path, monkeypatch):
    """Some families initialise a layer from the module around it, which asks for the weight of each layer."""
    model = CHECKPOINTS[kind]()
    model.save_pretrained(tmp_path)

    def read(self, *args, **kwargs):
        raise AssertionError("read before it was checked")

    with monkeypatch.context() as patched:
        for layer, name in ((Multiplies, "dequantize"), (ProductEmbedding, "dequantize"), (LowRank, "dense_weight")):
            patched.setattr(layer, name, read)
        loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    if kind == "ternary":  # whose levels are three, of the four that two bits can say
        rewrite(tmp_path, instead("transformer.h.0.mlp.c_proj.qweight", lambda words: torch.full_like(words, -1)))
        with pytest.raises(ValueError, match="c_proj.qweight must hold indices below 3, got 3"):
            type(model).from_pretrained(tmp_path)
