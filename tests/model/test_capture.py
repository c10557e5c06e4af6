"""Captured scores are those of eager attention; chosen layers only; nothing is left behind."""

import pytest
import torch
from helpers import FAMILIES, tiny_batch, tiny_model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_compress.model.capture import capture


def attention_probabilities(scores, allowed):
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_eager_attention(family, attn):
    """Softmax of the captured scores, over the positions that eager attention allows, equals eager's probabilities."""
    if family == "deberta-v2" and attn == "sdpa":
        attn = "eager"  # the only one it has
    model, eager = tiny_model(family, attn=attn).double(), tiny_model(family, attn="eager").double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(model).items()}
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True)
        plain = model(**batch).logits
        with capture(model, attention=range(4)) as signals:
            outputs = model(**batch)
    probabilities = expected.get("attentions") or (*expected.encoder_attentions, *expected.decoder_attentions)
    for layer, p in enumerate(probabilities):
        allowed = p > 0
        if family == "deberta-v2":  # its padded queries attend to everything alike, whatever their scores
            allowed = allowed & batch["attention_mask"].bool()[:, None, :, None]
        seen = attention_probabilities(signals.attention[layer].scores, allowed).nan_to_num()
        real = batch["attention_mask"].bool()[:, None, :, None] if "attention_mask" in batch else True
        if p.shape[-2] == allowed.shape[-2] and family != "bart":
            assert torch.equal((signals.attention[layer].allowed & real).expand_as(p), (p > 0) & real)
        # Most eager attentions take their softmax in float32 whatever the model's dtype.
        torch.testing.assert_close(seen[allowed], p[allowed], rtol=2e-6, atol=1e-7)
    assert torch.equal(outputs.logits, plain)


def test_cross_attention_scores():
    model, eager = tiny_model("bart").double(), tiny_model("bart", attn="eager").double()
    batch = tiny_batch(model, padding=False)
    with torch.no_grad(), capture(model, attention=[2, 3], cross=True) as signals:
        model(**batch)
    expected = eager(**batch, output_attentions=True).cross_attentions
    for layer, p in zip((2, 3), expected, strict=True):
        torch.testing.assert_close(signals.attention[layer].scores.softmax(-1), p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_hidden_states_are_the_models_own(family):
    model = tiny_model(family)
    batch = tiny_batch(model)
    with torch.no_grad(), capture(model, hidden_states=[0, 2, -1]) as signals:
        model(**batch)
        expected = model(**batch, output_hidden_states=True)
    states = expected.get("hidden_states") or (*expected.encoder_hidden_states, *expected.decoder_hidden_states)
    assert set(signals.hidden_states) == {0, 2, -1}
    for i, state in signals.hidden_states.items():
        assert torch.equal(state, states[i])


def test_only_chosen_layers_and_nothing_left_behind():
    model = tiny_model("bert")
    before = AttentionInterface.get_interface
    with torch.no_grad(), capture(model, attention=[1], hidden_states=[3]) as signals:
        outputs = model(**tiny_batch(model))
    assert set(signals.attention) == {1}
    assert AttentionInterface.get_interface is before
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa" and not model.config.output_hidden_states
    with torch.no_grad():
        assert model(**tiny_batch(model)).get("hidden_states") is None
    assert outputs.logits.shape == (3, 2)


def test_two_models_do_not_mix():
    model, other = tiny_model("bert"), tiny_model("bert", seed=1)
    with torch.no_grad(), capture(model, attention=[0]) as mine, capture(other, attention=[0]) as others:
        model(**tiny_batch(model))
        other(**tiny_batch(other))
        expected = (
            model.bert.encoder.layer[0]
            .attention.self.query(model.bert.embeddings(tiny_batch(model)["input_ids"]))
            .unflatten(-1, (4, 8))
        )
    torch.testing.assert_close(mine.attention[0].query, expected.transpose(1, 2))
    assert not torch.allclose(mine.attention[0].query, others.attention[0].query)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_the_forward_only(reentrant):
    """Without re-entry the gradients of a loss over scores equal those without checkpointing."""
    batch = tiny_batch(tiny_model("bert"))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("bert")
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.bert.encoder.layer[0].attention.self.dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        with capture(model, attention=[1], hidden_states=[2]) as signals:
            model(**batch)
        if checkpointing and reentrant:
            assert not signals.attention[1].query.requires_grad  # hence `require_gradients`
            return
        (signals.attention[1].scores.square().sum() + signals.hidden_states[2].sum()).backward()
        gradients.append(model.bert.encoder.layer[1].attention.self.query.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_signal_that_did_not_come_is_an_error():
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match=r"Attention of layers \[2\] was asked for"), capture(model, attention=[2]):
        pass


def test_layers_that_do_not_exist_are_refused():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="no attention layer of BertForSequenceClassification 4: expected -4 to 3"):
        capture(model, attention=[4]).__enter__()
    with pytest.raises(ValueError, match="Layer 0 .* has no cross-attention"):
        capture(tiny_model("bart"), attention=[0], cross=True).__enter__()


def test_flash_attention_is_passed_through_with_its_own_mask():
    """A kernel that, like flash attention, takes a padding mask (B, S) and knows causality by itself."""
    seen = []

    def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
        seen.append(attention_mask)
        T = query.shape[2]
        allowed = torch.ones(T, T, dtype=torch.bool).tril()
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("fused_for_test", flash)
    AttentionMaskInterface.register("fused_for_test", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model, eager = tiny_model("llama"), tiny_model("llama", attn="eager")
    model.set_attn_implementation("fused_for_test")
    batch = tiny_batch(model)
    with torch.no_grad(), capture(model, attention=[0, 3]) as signals:
        model(**batch)
        expected = eager(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()[:, None, :, None]
    for layer in (0, 3):
        assert signals.attention[layer].mask.dim() == 2
        allowed = (signals.attention[layer].allowed & real).expand_as(expected[layer])
        assert torch.equal(allowed, (expected[layer] > 0) & real)
        probabilities = attention_probabilities(signals.attention[layer].scores, allowed)
        torch.testing.assert_close(probabilities[allowed], expected[layer][allowed], rtol=1e-5, atol=1e-6)
    assert all(mask.shape == batch["attention_mask"].shape for mask in seen)
