"""A pruned model is saved and loaded with the methods every model has, and computes the same, bit for bit."""

import pytest
import torch
from helpers import FAMILIES, TASKS, default_task, tiny_batch, tiny_model
from silence import logits
from torch import nn
from transformers import AutoConfig, AutoModel

import hf_compress
from hf_compress.model.anatomy import anatomy
from hf_compress.surgery import prune_heads, prune_neurons

OTHER_TASKS = {"bert": ("tokens", "answers", "mlm", "clm"), "deberta-v2": ("mlm", "answers"), "modernbert": ("mlm",),
               "gpt2": ("classification", "tokens"), "llama": ("classification", "answers"),
               "bart": ("answers",), "distilbert": ("mlm", "answers")}  # fmt: skip
CASES = [(family, default_task(family)) for family in FAMILIES]
CASES += [(family, task) for family, tasks in OTHER_TASKS.items() for task in tasks]


def pruned(family: str, task: str | None = None, **changes) -> nn.Module:
    """Other numbers in each layer, one layer without heads, one without neurons."""
    model = tiny_model(family, task, **changes)
    width = anatomy(model).layers[0].feed_forward.num_neurons
    prune_heads(model, {0: [0, 1], 1: [0, 1, 2, 3], 3: [0, 3]})
    return prune_neurons(model, {0: [0, 5], 2: range(width), 3: range(10)})


def outputs(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(**tiny_batch(model))
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("family, task", CASES, ids=["-".join(case) for case in CASES])
def test_every_family_and_task_comes_back_bit_for_bit(family, task, tmp_path):
    model = pruned(family, task)
    model.save_pretrained(tmp_path)
    loaded, info = TASKS[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(loaded), strict=True))
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_the_backbone_alone_finds_its_layers(family, tmp_path):
    model = pruned(family)
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        assert torch.equal(backbone(**batch).last_hidden_state, expected)
    backbone.save_pretrained(tmp_path / "backbone")  # and the other way: a task class around a pruned backbone
    again = TASKS[default_task(family)].from_pretrained(tmp_path / "backbone").eval()
    with torch.no_grad():
        assert torch.equal(again.base_model(**batch).last_hidden_state, expected)


def test_a_pruned_model_is_an_ordinary_model_after_loading(tmp_path):
    pruned("bert").save_pretrained(tmp_path / "once")
    model = TASKS["classification"].from_pretrained(tmp_path / "once")
    assert not model.is_quantized
    assert model.half().dtype is torch.float16
    model.float()
    prune_heads(model, {2: [0]})
    model.save_pretrained(tmp_path / "twice", state_dict=model.state_dict())
    again = TASKS["classification"].from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(model), logits(again))
    assert anatomy(again).layers[2].attention.num_heads == 3


def test_the_file_is_smaller_by_the_removed_tensors(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "whole")
    prune_heads(tiny_model("bert"), {0: [1]}).save_pretrained(tmp_path / "pruned")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "pruned")]
    removed = (3 * (8 * 32 + 8) + 32 * 8) * 4  # rows and biases of q, k, v, columns of the output; float32
    assert abs(sizes[0] - sizes[1] - removed) < 200  # the header's numbers have fewer digits


def test_loading_in_another_dtype_and_by_a_config_object(tmp_path):
    model = pruned("bert")
    model.save_pretrained(tmp_path)
    half = TASKS["classification"].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(half), logits(model.to(torch.bfloat16)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert TASKS["classification"].from_pretrained(tmp_path, config=config).num_parameters() == model.num_parameters()
    again = TASKS["classification"].from_pretrained(tmp_path, config=half.config)  # of a model that was loaded
    assert again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2", "modernbert", "bart"])
def test_pruned_then_quantized_and_dequantized_again(family, tmp_path):
    model = hf_compress.quantize(pruned(family), bits=4)
    model.save_pretrained(tmp_path / "packed")
    loaded = TASKS[default_task(family)].from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    structure = loaded.config.quantization_config["structure"]
    loaded.dequantize()
    assert loaded.config.quantization_config["structure"] == structure
    assert "bits" not in loaded.config.quantization_config
    loaded.save_pretrained(tmp_path / "plain")
    plain = TASKS[default_task(family)].from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(loaded))
    with pytest.raises(ValueError, match="Cut it first"):
        prune_heads(model, {3: [0, 1]})
