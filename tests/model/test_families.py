"""Families beside those that most tests run on: what works, and what is refused by name."""

import pytest
import torch
from helpers import CONFIGS, tiny_batch, tiny_model

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy, in_features, is_readable, layer_maps, out_features
from hf_compress.quantization.modules import is_linear
from scripts.checks.families import OPERATIONS, attempt, table

UNREAD = {
    "albert": "one set of weights",
    "flaubert": "lists of their own",
    "squeezebert": "grouped convolutions",
    "xlm": "lists of their own",
}


def test_there_are_many_and_every_one_is_read_or_named():
    assert len(CONFIGS) >= 25
    assert {family for family in CONFIGS if not is_readable(tiny_model(family))} == set(UNREAD)


@pytest.mark.parametrize("family", UNREAD)
def test_what_structure_does_not_explain_says_why(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be read by structure: .*{UNREAD[family]}"):
        anatomy(model)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in UNREAD])
def test_linear_maps_in_lists_are_those_of_the_layers(family):
    """So that models that cannot be read are quantized by the same rule."""
    model = tiny_model(family)
    inside = {module for layer in anatomy(model).layers for module in layer.module.modules() if is_linear(module)}
    assert {module for module in layer_maps(model).values() if is_linear(module)} == inside


def test_the_output_of_an_attention_may_come_before_its_projections():
    """Phi-3: the output, then queries, keys and values in one; gate and up in one."""
    layer = anatomy(tiny_model("phi3")).layers[0]
    attention, part = layer.attention, layer.feed_forward
    assert attention.output is layer.module.self_attn.o_proj and attention.query is layer.module.self_attn.qkv_proj
    assert (attention.num_heads, attention.num_key_value_heads, attention.head_dim) == (4, 2, 8)
    assert part.is_fused and part.num_neurons == 48 and out_features(part.inputs[0]) == 96
    assert in_features(part.output) == 48


def test_layers_without_attention_have_no_heads():
    model = tiny_model("fnet")
    parts = anatomy(model)
    assert len(parts.layers) == 4 and parts.hidden_size == 32
    for refused in (
        lambda: parts.attentions,
        lambda: parts.layers[0].attention,
        lambda: hfc.prune_heads(model, {0: [0]}),
    ):
        with pytest.raises(ValueError, match="has no attention"):
            refused()
    student = hfc.make_student(model, num_hidden_layers=2, intermediate_size=24)
    assert [layer.feed_forward.num_neurons for layer in anatomy(student).layers] == [24, 24]


@pytest.mark.parametrize("family, why", [("convbert", "half convolutions"), ("mobilebert", "inside a bottleneck")])
def test_attention_that_is_not_described_leaves_neurons_and_layers(family, why, tmp_path):
    model = tiny_model(family).double()
    assert anatomy(model).hidden_size == 32 and not any(layer.attentions for layer in anatomy(model).layers)
    for refused in (lambda: anatomy(model).attentions, lambda: hfc.prune_heads(model, {0: [0]})):
        with pytest.raises(ValueError, match=f"layer.0 has .*{why}.*: there are no heads to measure"):
            refused()
    batch = tiny_batch(model)
    output = anatomy(model).layers[1].feed_forward.output
    with torch.no_grad():
        output.weight[:, [0, 5]] = 0
        expected = model(**batch).logits
        hfc.prune_neurons(model, {1: [0, 5]})
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-12)
        blocks = [layer.module for layer in anatomy(model).layers]
        hfc.prune_layers(model, [1, 3])
        assert [layer.module for layer in anatomy(model).layers] == [blocks[1], blocks[3]]
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-12)


def test_grouped_maps_are_not_taken_for_a_feed_forward():
    with pytest.raises(ValueError, match="intermediate.dense and output.dense"):
        anatomy(tiny_model("convbert", num_groups=2))


def test_heads_that_cannot_go_from_one_layer_are_refused():
    with pytest.raises(ValueError, match="by the width of the model"):
        hfc.prune_heads(tiny_model("longformer"), {1: [0]})


def test_slots_of_the_cache_follow_whatever_they_are_called():
    """GPT-Neo calls them `layer_id`."""
    model = hfc.prune_layers(tiny_model("gpt_neo"), [0, 2, 3])
    assert [layer.attention.module.layer_id for layer in anatomy(model).layers] == [0, 1, 2]
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("family", ["fnet", "phi3", "xlm"])
def test_operations_hold_their_properties(family):
    """A part of what the script tries, which takes minutes for all."""
    for name in ("`prune_neurons`", "`quantize`, to nearest", "`prepare_qat`, `pack_qat`"):
        outcome = attempt(family, OPERATIONS[name])
        assert outcome == "works" or (family == "xlm" and "cannot be read" in outcome), (name, outcome)


def test_the_script_calls_wrong_what_is_wrong():
    def lies(trial):
        assert torch.equal(torch.zeros(1), torch.ones(1))

    def refuses(trial):
        raise ValueError("not with this one")

    assert attempt("bert", lies).startswith("wrong: AssertionError")
    outcomes = dict.fromkeys(OPERATIONS, "works") | {
        "`prune_heads`": attempt("bert", refuses),
        "`prune_layers`": "wrong: x",
    }
    page = table({"bert": outcomes})
    assert "refused (1)" in page and "1. not with this one" in page and "**wrong**" in page
