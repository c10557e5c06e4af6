"""The parts that structure finds are the parts the model uses."""

import pytest
import torch
from helpers import FAMILIES, tiny_batch, tiny_model
from torch import nn

from hf_compress.model.anatomy import anatomy, in_features, module_names, out_features

KV_GROUPED = ("llama", "qwen2", "qwen3", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_shapes_are_those_of_the_config(family):
    model = tiny_model(family)
    found = anatomy(model)
    assert len(found.layers) == 4
    for layer in found.layers:
        for attention in layer.attentions:
            assert (attention.num_heads, attention.head_dim) == (4, 8)
            assert attention.num_key_value_heads == (2 if family in KV_GROUPED else 4)
            assert (in_features(attention.output), out_features(attention.output)) == (32, 32)
        assert layer.feed_forward.num_neurons == (128 if family == "gpt2" else 48)
        assert all(in_features(m) == 32 for m in layer.feed_forward.inputs)
    assert found.hidden_size == 32
    assert len(found.stacks) == (2 if family == "bart" else 1)
    assert [len(layer.attentions) for layer in found.layers] == ([1, 1, 2, 2] if family == "bart" else [1] * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_silencing_what_was_found_equals_zeroing_its_weights(family):
    """Head 0 of each attention and neuron 0 of each feed-forward: hooks on the outputs against zeroed columns."""
    model, twin = tiny_model(family).double(), tiny_model(family).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(model).items()}

    def silence(width):
        def hook(module, args):
            return (torch.cat([torch.zeros_like(args[0][..., :width]), args[0][..., width:]], dim=-1),)

        return hook

    for layer, other in zip(anatomy(model).layers, anatomy(twin).layers, strict=True):
        pairs = [(a.output, b.output, a.head_dim) for a, b in zip(layer.attentions, other.attentions, strict=True)]
        for module, other_module, width in [*pairs, (layer.feed_forward.output, other.feed_forward.output, 1)]:
            module.register_forward_pre_hook(silence(width))
            columns = other_module.weight.T if isinstance(other_module, nn.Linear) else other_module.weight
            columns.data[:width] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=0, atol=1e-12)
        changed = tiny_model(family).double()(**batch).logits
    assert not torch.allclose(changed, twin(**batch).logits)


def test_cutting_queries_does_not_hide_the_output_projection():
    """A head cut by hand still leaves an attention that structure explains."""
    model = tiny_model("bert")
    attention = anatomy(model).layers[1].attention
    for module in (attention.query, attention.key, attention.value):
        module.weight.data, module.out_features = module.weight.data[:24], 24
    attention.output.weight.data, attention.output.in_features = attention.output.weight.data[:, :24], 24
    assert anatomy(model).layers[1].attention.num_heads == 3


def test_a_square_feed_forward_is_not_taken_for_an_attention_output():
    layer = anatomy(tiny_model("bert", intermediate_size=32)).layers[0]
    names = module_names(layer.module)
    assert names[layer.attention.output] == "attention.output.dense"
    assert names[layer.feed_forward.output] == "output.dense"


def test_a_layer_without_attention_is_refused_and_named():
    model = tiny_model("bert")
    model.bert.encoder.layer[2].attention = nn.Identity()
    with pytest.raises(ValueError, match=r"query, key and value projections in bert\.encoder\.layer\.2"):
        anatomy(model)
