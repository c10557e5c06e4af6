"""A model with fewer layers computes what the same layers compute in a row, and stays a plain checkpoint."""

import copy
import json
import pickle

import pytest
import torch
from helpers import DECODERS, FAMILIES, TASKS, default_task, tiny_batch, tiny_model
from silence import logits
from torch import nn
from transformers import AutoModel

import hf_compress  # noqa: F401  registers the loader
from hf_compress.model.anatomy import anatomy
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
SMALL_WINDOW = {"gemma3_text": dict(layer_types=TYPES, sliding_window=4),
                "qwen2": dict(layer_types=TYPES, sliding_window=4, use_sliding_window=True)}  # fmt: skip


def skip_layers(model: nn.Module, gone: list[int]) -> None:
    """The reference: the full model, in which the layers named pass on what they get."""

    def skip(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for number in gone:
        anatomy(model).layers[number].module.register_forward_hook(skip, with_kwargs=True)


@pytest.mark.parametrize("keep", [[0, 2], [1, 2, 3], [3], [2, 0]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_left_compute_what_they_did(family, keep):
    if family == "bart":
        keep = {"[3]": [1, 3], "[0, 2]": [0, 2], "[2, 0]": [2, 1, 0]}.get(str(keep), keep)
    model = tiny_model(family, **SMALL_WINDOW.get(family, {})).double()
    twin = tiny_model(family, **SMALL_WINDOW.get(family, {})).double()
    if keep == sorted(keep):
        skip_layers(twin, [i for i in range(4) if i not in keep])
        expected = logits(twin)
        assert prune_layers(model, keep) is model
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    else:
        prune_layers(model, keep)
    assert len(anatomy(model).layers) == len(keep)


@pytest.mark.parametrize("keep", [[0, 2], [1, 2, 3], [2, 0]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_plain_unless_the_family_builds_the_layers_differently(family, keep, tmp_path):
    if family == "bart":
        keep = [*keep, 1] if 1 not in keep else keep
    model = prune_layers(tiny_model(family, **SMALL_WINDOW.get(family, {})), keep)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if family == "modernbert" and keep != [0, 2]:  # its first layer has no norm: a shorter config builds one without
        assert record["structure"] == {"layers": {"config": {"num_hidden_layers": 4, "layer_types": [
            "full_attention", "sliding_attention"] * 2}, "keep": {"layers": keep}}}  # fmt: skip
    else:
        assert record is None
    loaded = TASKS[default_task(family)].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_layers_that_a_shorter_config_cannot_build_are_cut_again_and_loaded(tmp_path):
    model = prune_layers(tiny_model("modernbert"), [1, 2, 3])
    prune_heads(model, {0: [1], 2: [0, 1]})
    prune_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]["structure"]
    assert record["layers"]["keep"] == {"layers": [1, 3]}
    assert torch.equal(logits(TASKS["classification"].from_pretrained(tmp_path)), logits(model))


def test_scaling_by_depth_stays_with_the_layer(tmp_path):
    """GPT-2 may scale the scores of layer i by 1 / (i + 1): the second keeps its half when it becomes the first."""
    model = prune_layers(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), [1, 3])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(TASKS["clm"].from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("family", [*DECODERS, "bart", "t5"])
def test_generation_with_a_cache_equals_generation_without(family):
    model = tiny_model(family, **SMALL_WINDOW.get(family, {}))
    prune_heads(model, {2 if family not in ("bart", "t5") else 4: range(4)})
    prune_layers(model, [1, 2, 3])  # the decoder is deeper than the encoder then
    batch = {k: v for k, v in tiny_batch(model, padding=False).items() if k in ("input_ids", "attention_mask")}
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(
        model.generate(**batch, **settings, use_cache=True), model.generate(**batch, **settings, use_cache=False)
    )


def test_heads_neurons_and_layers_compose_in_any_order():
    one, other = tiny_model("bert"), tiny_model("bert")
    prune_layers(prune_neurons(prune_heads(one, {2: [1]}), {2: [3, 4]}), [0, 2])
    prune_heads(prune_neurons(prune_layers(other, [0, 2]), {1: [3, 4]}), {1: [1]})
    assert torch.equal(logits(one), logits(other))
    assert one.config.to_dict() == other.config.to_dict()


@pytest.mark.parametrize("family, changes", [("modernbert", {}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True})])
def test_special_layers_come_back_as_backbone_and_with_a_head(family, changes, tmp_path):
    model = prune_layers(tiny_model(family, **changes), [1, 3])
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        assert torch.equal(backbone(**batch).last_hidden_state, expected)
    backbone.save_pretrained(tmp_path / "backbone")
    again = TASKS[default_task(family)].from_pretrained(tmp_path / "backbone")
    with torch.no_grad():
        assert torch.equal(again.base_model(**batch).last_hidden_state, expected)
    twin = prune_layers(tiny_model(family, seed=1, **changes), [1, 3])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


def test_a_layer_without_heads_does_not_make_the_other_layers_special():
    model = prune_layers(prune_heads(tiny_model("deberta-v2"), {1: range(4)}), [1, 2])
    assert "layers" not in model.config.quantization_config["structure"]


@pytest.mark.parametrize("keep, message", [
    ([], "leaves no layer in bert.encoder.layer"),
    ([0, 4], "layers from 0 to 3"),
    ([-1], "layers from 0 to 3"),
    ([1, 1], "each at most once"),
], ids=str)  # fmt: skip
def test_bad_layers_are_refused_and_nothing_changes(keep, message):
    model = tiny_model("bert")
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        prune_layers(model, keep)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


def test_a_decoder_keeps_at_least_one_layer():
    with pytest.raises(ValueError, match="leaves no layer in model.decoder.layers"):
        prune_layers(tiny_model("bart"), [0, 1])


@pytest.mark.parametrize("family", ["modernbert", "gemma3_text"])
def test_layers_of_a_deeper_model_can_be_pickled_and_copied(family):
    model = prune_layers(tiny_model(family, **SMALL_WINDOW.get(family, {})), [1, 2, 3])
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(other), logits(model))
        assert other.state_dict().keys() == model.state_dict().keys()
