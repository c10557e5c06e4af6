"""A model whose neurons are cut out computes what it computed with those neurons silenced."""

import pytest
import torch
from helpers import FAMILIES, tiny_model
from silence import logits, silenced

from hf_compress.model.anatomy import anatomy
from hf_compress.surgery import prune_heads, prune_neurons


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_neurons_equal_silenced_neurons(family):
    model = tiny_model(family).double()
    width = anatomy(model).layers[0].feed_forward.num_neurons
    neurons = {0: [0, 5, width - 1], 1: range(width), 3: range(0, width, 2)}
    with silenced(model, neurons=neurons):
        expected = logits(model)
    prune_neurons(model, neurons)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert [layer.feed_forward.num_neurons for layer in anatomy(model).layers] == [width - 3, 0, width, width // 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_width_everywhere_needs_no_record(family):
    """Stock Transformers can build it: the config says it, in the family's own word."""
    model = tiny_model(family)
    prune_neurons(model, {i: range(8) for i in range(4)})
    assert not hasattr(model.config, "quantization_config")
    twin = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(twin), logits(model))


def test_widths_that_become_equal_again_leave_no_record():
    model = prune_neurons(tiny_model("bert"), {0: range(8)})
    assert model.config.intermediate_size == 48
    assert "encoder.layer.0.intermediate.dense" in model.config.quantization_config["structure"]["shapes"]
    prune_neurons(model, {1: range(8), 2: range(8), 3: range(8)})
    assert model.config.intermediate_size == 40
    assert not hasattr(model.config, "quantization_config")


def test_equal_widths_stay_in_the_config_while_heads_need_the_record():
    model = prune_heads(tiny_model("bert"), {0: [0]})
    prune_neurons(model, {i: range(8) for i in range(4)})
    assert model.config.intermediate_size == 40
    assert model.config.quantization_config["structure"]["shapes"].keys() == {
        f"encoder.layer.0.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")
    }


def test_uniform_heads_go_into_a_config_that_can_say_them():
    model = prune_heads(tiny_model("qwen3"), {i: [0, 1] for i in range(4)})
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    assert not hasattr(model.config, "quantization_config")
    model = prune_heads(tiny_model("bert"), {i: [0, 1] for i in range(4)})  # 32 / 2 would make heads of size 16
    assert model.config.num_attention_heads == 4
    assert hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("neurons, message", [
    ({4: [0]}, "Layer 4 does not exist"),
    ({0: [0], 1: [48]}, r"Neurons \[48\] of layer 1"),
    ({i: range(48) for i in range(4)}, "remove every neuron"),
])  # fmt: skip
def test_bad_neurons_are_refused_and_nothing_changes(neurons, message):
    model = tiny_model("bert")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        prune_neurons(model, neurons)
    assert torch.equal(logits(model), before)
