"""`dequantize` gives the same ordinary model, whatever was done with the packed one before."""

import pytest
import torch
from helpers import TASKS, default_task, tiny_batch, tiny_model
from torch import nn

import hf_compress as hfc
from hf_compress.checkpoint.bits import packed_modules
from hf_compress.quantization.modules import matrix


def saved(model, folder):
    model.save_pretrained(folder)  # turns `config.dtype` into a string
    return model


def measured(model, folder):
    hfc.measure(model, sequence_length=8, latency_rounds=1, throughput_rounds=1)
    return model


def cast(model, folder):
    return model.to(torch.bfloat16)  # `config.dtype` stays float32


def loaded(model, folder):
    return TASKS[default_task(model.config.model_type)].from_pretrained(saved(model, folder).name_or_path or folder)


def loaded_in_half(model, folder):
    saved(model, folder)
    return TASKS[default_task(model.config.model_type)].from_pretrained(folder, dtype="bfloat16")


BEFORE = [saved, measured, cast, loaded, loaded_in_half]
KINDS = [
    ("bert", {}),
    ("gpt2", dict(embedding_bits=8)),
    ("bart", dict(embedding_bits=4)),
    ("llama", dict(grid="kmeans", group_size=-1)),
]


@pytest.mark.parametrize("before", BEFORE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family, options", KINDS, ids=[family for family, _ in KINDS])
def test_the_weights_are_those_the_packed_layers_stood_for(family, options, before, tmp_path):
    model = before(hfc.quantize(tiny_model(family), 4, **options), tmp_path)
    weights = {name: module.dequantize() for name, module in packed_modules(model)}
    plain = model.dequantize()
    assert weights and not any(packed_modules(plain))
    for name, weight in weights.items():
        assert torch.equal(matrix(plain.get_submodule(name)), weight)
    assert {parameter.dtype for parameter in plain.parameters()} == {model.dtype}
    plain(**tiny_batch(plain))  # in one dtype throughout
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64], ids=str)
def test_a_dtype_is_that_of_the_whole_model(dtype, tmp_path):
    model = saved(hfc.quantize(tiny_model("bert"), 4), tmp_path)
    name, module = next(packed_modules(model))
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    weight = module.dequantize(wanted)
    plain = model.dequantize(dtype)
    assert {parameter.dtype for parameter in plain.parameters()} == {wanted}
    assert torch.equal(matrix(plain.get_submodule(name)), weight)
    plain(**tiny_batch(plain))


@pytest.mark.parametrize("before", [saved, measured, cast], ids=lambda f: f.__name__)
def test_a_plain_export_comes_after_any_of_them(before, tmp_path):
    model = before(hfc.quantize(tiny_model("bert"), 4, embedding_bits=8), tmp_path / "packed")
    hfc.export(model, tmp_path / "plain", format="plain")
    plain = TASKS["classification"].from_pretrained(tmp_path / "plain")
    assert type(plain.bert.encoder.layer[0].output.dense) is nn.Linear
    for name, module in packed_modules(model):
        assert torch.equal(matrix(plain.get_submodule(name)), module.dequantize().to(plain.dtype))
