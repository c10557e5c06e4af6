"""Checkpoints of other tools whose config and tensors do not agree, or that were made to hang a reader."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.formats.foreign import matches
from scripts.checks.checkpoints import bert

ENDLESS = r"(.|\w)*(.|\w)*(.|\w)*(.|\w)*[0-9]$"  # a name of n letters can be cut in n^4 ways
DENSE = "bert.encoder.layer.0.output.dense"


def settings_of(folder, **changes):
    for file in ("config.json", "quantize_config.json"):
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            content.get("quantization_config", content).update(changes)
            (folder / file).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("changes, message", [
    ({"bits": 8}, "has bits 4 by its tensors, and 8 by the config"),
    ({"bits": "4"}, "has bits 4 by its tensors, and '4'"),
    ({"group_size": 8}, "has group_size 16 by its tensors, and 8"),
    ({"group_size": -1}, "has group_size 16 by its tensors, and"),
    ({"dynamic": {f"+:^{DENSE}": {"bits": 2}}}, "has bits 4 by its tensors, and 2"),
    ({"dynamic": [1]}, "`dynamic` must map"),
    ({"dynamic": {"+:((": {"bits": 4}}}, "is no pattern of module names"),
    ({"dynamic": {f"+:{ENDLESS}": {}}}, "takes too long"),
    ({"checkpoint_format": 3}, "has the GPTQ format 3"),
    ({"sym": True}, "is not what the config says with sym=True"),
], ids=str)  # fmt: skip
def test_gptq_settings_that_contradict_the_tensors(changes, message, tmp_path):
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="gptq")
    settings_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        hfc.load_gptq(tmp_path)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_gptq_without_one_of_its_tensors(part, tmp_path):
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{DENSE}.{part}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{DENSE}|nothing that config.json speaks of"):
        hfc.load_gptq(tmp_path)


def test_gptq_columns_out_of_order_that_the_config_denies(tmp_path):
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{DENSE}.g_idx"] = tensors[f"{DENSE}.g_idx"].flip(0)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="with desc_act=False"):
        hfc.load_gptq(tmp_path)
    settings_of(tmp_path, desc_act=True)
    assert hfc.load_gptq(tmp_path).get_submodule(DENSE).g_idx is not None


ODD = {
    "scales": (lambda t: t.int(), "scales of .'F16', 'BF16', 'F32'.*I32"),
    "qweight": (lambda t: t.long(), "qweight of .'I32'.*I64"),
    "qzeros": (lambda t: t.float(), "qzeros of .'I32'.*F32"),
    "g_idx": (lambda t: t.float(), "g_idx of .'I32', 'I64'.*F32"),
    "bias": (lambda t: (t * 9).int(), "bias must hold torch.float32, but is I32"),
}


@pytest.mark.parametrize("part", ODD)
def test_gptq_numbers_of_another_kind(part, tmp_path):
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    change, message = ODD[part]
    tensors[f"{DENSE}.{part}"] = change(tensors[f"{DENSE}.{part}"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{DENSE}.*{message}"):
        hfc.load_gptq(tmp_path)


@pytest.mark.parametrize("index", [-1, 4], ids=["negative", "beyond"])
def test_gptq_groups_that_are_not_there(index, tmp_path):
    """Other readers count a negative one from the end; what wrote it is not known, so it is not guessed at."""
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{DENSE}.g_idx"][3] = index
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{DENSE}.g_idx must lie in .0, 3., got"):
        hfc.load_gptq(tmp_path)


def group(**changes):
    def change(settings):
        settings["config_groups"]["group_0"].update(changes)

    return change


@pytest.mark.parametrize("change, message", [
    (group(targets=[f"re:{ENDLESS}"]), "takes too long"),
    (group(targets=["re:(("]), "is no pattern"),
    (group(targets="Linear"), "must have targets, a list"),
    (group(targets=[["Linear"]]), "must have targets, a list"),
    (group(weights=[4]), "weights must be a mapping"),
    (group(input_activations=1.5), "input_activations must be a mapping"),
    (lambda s: s["config_groups"]["group_0"]["weights"].update(symmetric=True), "than symmetric=True says"),
    (lambda s: s.update(config_groups=["x"]), "config_groups must be a mapping"),
    (lambda s: s.update(sparsity_config="x"), "sparsity_config must be a mapping"),
], ids=["hangs", "no-pattern", "text", "lists", "weights", "inputs", "symmetric", "groups", "sparsity"])  # fmt: skip
def test_compressed_tensors_settings_that_are_none(change, message, tmp_path):
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        hfc.load_compressed_tensors(tmp_path)


def test_a_scale_read_as_another_kind_of_number(tmp_path):
    """The same bytes, half of each number's bits meaning another thing."""
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="compressed-tensors")
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{DENSE}.weight_scale"
    assert tensors[name].dtype == torch.float16
    save_file({**tensors, name: tensors[name].view(torch.bfloat16)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is torch.bfloat16 in the file"):
        hfc.load_compressed_tensors(tmp_path)


@pytest.mark.parametrize("name", ["extra", f"{DENSE}.weight_extra", "bert.encoder.layer.9.output.dense.bias"])
def test_compressed_tensors_that_nothing_speaks_of(name, tmp_path):
    hfc.export(hfc.quantize(bert(), 4, group_size=16), tmp_path, format="compressed-tensors")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, name: torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="of which its config says nothing|and knows"):
        hfc.load_compressed_tensors(tmp_path)


@pytest.mark.parametrize("pattern", [ENDLESS, r"re:(.|.)*(.|.)*(.|.)*(.|.)*\d$", r"(\w|.|\w)*(\w|.)*(.|\w)*(.|.)*4$"])
def test_a_pattern_that_never_ends_is_ended(pattern, monkeypatch):
    monkeypatch.setattr("hf_compress.formats.foreign.PATTERN_SECONDS", 0.05)
    with pytest.raises(ValueError, match="takes too long"):
        matches(pattern.removeprefix("re:"), "a4" * 40 + "!")


@pytest.mark.parametrize("load", [hfc.load_gptq, hfc.load_compressed_tensors])
def test_what_is_nowhere_is_named(load, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.formats.foreign.snapshot_download", missing)
    for name, reason in ((tmp_path / "gone", "Repo id must be"), ("user/gone", "the Hub does not know it")):
        with pytest.raises(ValueError, match=f"There is no checkpoint '{name}': it is no folder here, and {reason}"):
            load(name)
    with pytest.raises(TypeError, match="expected a folder or the name of a repository, got Linear"):
        load(torch.nn.Linear(2, 2))


def missing(*args, **kwargs):
    raise OSError("the Hub does not know it\nand more")
