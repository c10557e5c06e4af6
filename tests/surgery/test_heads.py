"""A model whose heads are cut out computes what it computed with those heads silenced."""

import copy

import pytest
import torch
from helpers import DECODERS, FAMILIES, tiny_batch, tiny_model
from silence import logits, silenced
from torch import nn
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
)

from hf_compress.model.anatomy import anatomy
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

GROUPED = ("llama", "qwen2", "qwen3", "gemma3_text")
PLANS = {
    "different-in-each-layer": {0: [1], 1: [0, 2, 3], 3: [0, 3]},
    "none-left-in-one-layer": {1: [0, 1, 2, 3], 2: [0]},
    "none-left-in-the-first-layer": {0: [0, 1, 2, 3]},
    "uniform": {0: [3], 1: [0], 2: [1], 3: [2]},
}
GROUPED_PLANS = {
    "different-in-each-layer": {0: [2, 3], 1: [0, 3], 3: [0, 1]},  # a whole group, one of each group, a whole group
    "none-left-in-one-layer": {1: [0, 1, 2, 3], 2: [1, 2]},
    "none-left-in-the-first-layer": {0: [0, 1, 2, 3]},
    "uniform": {0: [0, 1], 1: [2, 3], 2: [0, 1], 3: [0, 1]},
}


def plan_for(family: str, plan: str) -> dict[int, list[int]]:
    plans = GROUPED_PLANS if family in GROUPED else PLANS
    return plans[plan]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_heads_equal_silenced_heads(family, plan):
    model, heads = tiny_model(family).double(), plan_for(family, plan)
    before = logits(model)
    with silenced(model, heads=heads):
        expected = logits(model)
    left = [a.num_heads - len(heads.get(i, ())) for i, a in enumerate(anatomy(model).attentions)]
    assert prune_heads(model, heads) is model
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)  # float64 sums in another order
    assert not torch.allclose(before, expected)
    assert [a.num_heads for a in anatomy(model).attentions] == left


@pytest.fixture
def fused_attention(monkeypatch):
    """The numbers of heads that PyTorch's fused attention is called with: where it is none, it may divide by zero."""
    heads, attend = [], nn.functional.scaled_dot_product_attention

    def noted(query, *args, **kwargs):
        heads.append(query.shape[1])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    return heads


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "deberta-v2"])  # which has no fused attention
def test_no_heads_never_reach_the_fused_attention(family, fused_attention, tmp_path):
    model = prune_heads(tiny_model(family, attn="sdpa"), {0: [0, 1, 2, 3], 2: [0, 1, 2, 3]})
    model.save_pretrained(tmp_path)
    for one in (model, copy.deepcopy(model), type(model).from_pretrained(tmp_path, attn_implementation="sdpa")):
        fused_attention.clear()
        logits(one)
        assert set(fused_attention) == {4}, "the layers that have heads run the fused attention, the others do not"
    assert model.config._attn_implementation == "sdpa"


def test_no_heads_give_probabilities_of_no_heads():
    model = prune_heads(tiny_model("bert", attn="eager"), {1: [0, 1, 2, 3]})
    batch = tiny_batch(model)
    heads = [probabilities.shape[1] for probabilities in model(**batch, output_attentions=True).attentions]
    assert heads == [4, 0, 4, 4]


def test_heads_that_stay_keep_their_attention_when_a_cut_fails():
    model = tiny_model("bert", attn="sdpa")
    with pytest.raises(ValueError, match="do not exist"):
        prune_heads(model, {0: [0, 1, 2, 3], 1: [4]})
    assert {a.module.config._attn_implementation for a in anatomy(model).attentions} == {"sdpa"}


def test_cross_attention_counts_as_an_attention_of_its_own():
    model = tiny_model("bart").double()
    heads = {2: [0], 3: [1, 2], 5: [0, 1, 2, 3]}  # 0, 1: encoder; 2, 3: decoder layer 0, itself and over the encoder
    with silenced(model, heads=heads):
        expected = logits(model)
    prune_heads(model, heads)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    layer = model.model.decoder.layers[0]
    assert (layer.self_attn.q_proj.out_features, layer.encoder_attn.q_proj.out_features) == (24, 16)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", [*DECODERS, "bart"])
def test_generation_with_a_cache_equals_generation_without(family, plan):
    model = tiny_model(family)
    prune_heads(model, plan_for(family, plan))
    batch = {k: v for k, v in tiny_batch(model, padding=False).items() if k in ("input_ids", "attention_mask")}
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(
        model.generate(**batch, **settings, use_cache=True), model.generate(**batch, **settings, use_cache=False)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_cached_steps_give_the_logits_of_a_full_pass_when_the_first_layer_has_no_heads(family):
    """The cache's first slot tells the model where it is in the sequence."""
    model = prune_heads(tiny_model(family).double(), {0: [0, 1, 2, 3]})
    ids = tiny_batch(model, padding=False)["input_ids"]
    with torch.no_grad():
        full = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :6], use_cache=True)
        rest = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama", "modernbert"])
def test_heads_can_be_pruned_again(family):
    once, twice = tiny_model(family).double(), tiny_model(family).double()
    prune_heads(once, {1: [0, 1], 2: [0, 1, 2, 3]})
    prune_heads(twice, {1: [0, 1]})
    prune_heads(twice, {2: [0, 1]})
    prune_heads(twice, {2: [0, 1]})  # what is left of layer 2, counted anew
    assert torch.equal(logits(once), logits(twice))
    assert once.config.to_dict() == twice.config.to_dict()


def test_gradients_flow_through_a_layer_without_heads():
    for family in FAMILIES:
        model = prune_heads(tiny_model(family), {1: range(4)})
        prune_neurons(model, {1: range(anatomy(model).layers[1].feed_forward.num_neurons)})
        model.train()
        model(**tiny_batch(model)).logits.sum().backward()
        output = anatomy(model).attentions[1].output
        assert output.bias is None or output.bias.grad.abs().sum() > 0, family


def test_parameters_keep_their_settings():
    model = tiny_model("bert").to(torch.bfloat16)
    query = anatomy(model).layers[0].attention.query
    query.weight.requires_grad_(False)
    prune_heads(model, {0: [1]})
    assert query.weight.dtype is torch.bfloat16
    assert not query.weight.requires_grad
    assert query.bias.requires_grad
    assert query.weight.is_contiguous()


@pytest.mark.parametrize("heads, message", [
    ({4: [0]}, "Attention 4 does not exist"),
    ({-1: [0]}, "Attention -1 does not exist"),
    ({0: [0, 1], 1: [4]}, r"Heads \[4\] of attention 1 .* do not exist"),
    ({i: range(4) for i in range(4)}, "remove every head"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_bad_heads_are_refused_and_nothing_changes(family, heads, message):
    model = tiny_model(family)
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        prune_heads(model, heads)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_unequal_groups_are_refused():
    with pytest.raises(ValueError, match=r"would keep \[1, 2\]"):
        prune_heads(tiny_model("llama"), {0: [1]})


def test_the_heads_of_the_layers_that_count_positions_cannot_all_go():
    model = tiny_model("gemma3_text", layer_types=["full_attention", *["sliding_attention"] * 3])
    with pytest.raises(ValueError, match="'full_attention' layers"):
        prune_heads(model, {0: range(4)})


def test_a_shared_weight_is_refused_by_name():
    model = tiny_model("bert")
    layers = model.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    with pytest.raises(ValueError, match="shared by bert.encoder.layer.0.attention.self.query"):
        prune_heads(model, {0: [0]})


def test_a_layer_that_is_no_plain_linear_is_refused():
    class Wrapped(nn.Linear):
        pass

    model = tiny_model("bert")
    model.bert.encoder.layer[0].attention.self.key.__class__ = Wrapped
    with pytest.raises(ValueError, match="A Wrapped cannot be cut"):
        prune_heads(model, {0: [0]})


def test_an_unknown_parameter_of_the_attention_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="self_attn.sinks"):
        prune_heads(model, {0: [0, 1]})


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("bert")
    before, config = logits(model), model.config.to_dict()
    monkeypatch.setattr("hf_compress.surgery.transaction.settle", lambda model, changes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_heads(model, {0: [0], 1: [2]})
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)
    assert [a.num_heads for a in anatomy(model).attentions] == [4] * 4


def test_t5_may_lose_neurons_and_layers():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double().eval()
    with silenced(model, neurons={1: [3, 5], 2: range(48)}):
        expected = logits(model)
    prune_neurons(model, {1: [3, 5], 2: range(48)})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    prune_layers(model, [0, 2])
    assert (model.config.num_layers, model.config.num_decoder_layers) == (1, 1)
