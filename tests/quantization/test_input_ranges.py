"""Ranges of 8-bit inputs that nothing could be rounded to: refused where they come in."""

import json

import pytest
import torch
from helpers import tiny_batch, tiny_model
from silence import logits

import hf_compress as hfc
from hf_compress.engines.rounding import grid_of_range
from hf_compress.layers.scheme import LARGEST_INPUT, SMALLEST_RANGE, WeightScheme, check_activation_range
from hf_compress.model.record import record_digest
from hf_compress.quantization.fake_quantize import ActivationQuantizer

ODD = {
    "infinite": (-1.0, float("inf")),
    "not a number": (float("nan"), 1.0),
    "upside down": (1.0, -1.0),
    "a point": (0.0, 0.0),
    "without zero": (1.0, 2.0),
    "endless": (-1e30, 1e30),
    "no width": (0.0, 1e-40),
}


@pytest.mark.parametrize("limits", ODD.values(), ids=ODD)
def test_a_record_with_such_a_range_is_refused(limits, tmp_path):
    with pytest.raises(ValueError, match="must hold zero, reach no further than"):
        WeightScheme(8, activation_bits=8, activation_range=limits)
    model = hfc.prepare_qat(tiny_model("bert").train(), 8, embedding_bits=None)
    model(**tiny_batch(model))
    hfc.pack_qat(model.eval()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    record = config["quantization_config"]
    name = next(iter(record["bits"]))
    record["bits"][name]["activation_range"] = limits
    record["digest"] = record_digest(record)
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*must hold zero"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("limits", [(-LARGEST_INPUT, 1.0), (0.0, SMALLEST_RANGE), (-3.0, 5.0)], ids=str)
def test_what_lies_within_works(limits):
    check_activation_range(*limits)
    scale, zero = grid_of_range(*limits)
    assert 0 < scale < torch.inf and 0 <= zero <= 255


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_inputs_that_no_range_holds_end_the_training_with_the_name_of_the_layer(value):
    model = hfc.prepare_qat(tiny_model("bert").train(), 8, embedding_bits=None)
    model(**tiny_batch(model))
    quantizer = model.bert.encoder.layer[2].output.dense.input_quantizer
    before = quantizer.range()
    model.bert.encoder.layer[2].intermediate.register_forward_hook(lambda m, a, y: torch.full_like(y, value))
    with pytest.raises(ValueError, match="inputs of bert.encoder.layer.2.output.dense reach from"):
        model(**tiny_batch(model))
    assert quantizer.range() == before  # what was seen before stays


def test_inputs_that_are_all_but_zero_have_no_range_yet():
    quantizer = ActivationQuantizer(name="a map").train()
    x = torch.full((2, 3), 1e-42)
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer(x[:0]), x[:0])
    assert quantizer(torch.ones(2, 3)).eq(1).all()


def test_a_map_that_saw_nothing_but_zeros_is_packed_and_leaves_its_inputs_as_they_are(tmp_path):
    """As behind heads that an earlier pruning silenced: refused only when the training was over."""
    model = tiny_model("bert").double()
    value = model.bert.encoder.layer[0].attention.self.value.requires_grad_(False)
    value.weight.zero_(), value.bias.zero_()
    hfc.prepare_qat(model.train(), 4, embedding_bits=None)
    model(**tiny_batch(model))
    expected = logits(model.eval())
    hfc.finish(model).save_pretrained(tmp_path)
    assert model.bert.encoder.layer[0].attention.output.dense.scheme == WeightScheme(4)
    assert model.bert.encoder.layer[1].attention.output.dense.scheme.activation_bits == 8
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    for finished in (model, loaded):
        torch.testing.assert_close(logits(finished), expected, rtol=0, atol=1e-9)
