"""Models whose layers are no modules of their own: what can be cut of them, and what is refused."""

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.model.cuttable import cuttable

FAMILIES = ("albert", "xlm", "flaubert")


def logits(model: nn.Module) -> Tensor:
    batch = tiny_batch(model)
    if model.config.model_type == "albert":
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**batch).logits


def model_of(family: str, **changes) -> nn.Module:
    return tiny_model(family, **changes).double()


def silence(model: nn.Module, *, heads: dict, neurons: dict) -> None:
    """The reference: zeros in the columns of the outputs, written out for each family."""
    if model.config.model_type == "albert":
        outputs = [layer.attention.dense for g in model.albert.encoder.albert_layer_groups for layer in g.albert_layers]
        seconds = [layer.ffn_output for g in model.albert.encoder.albert_layer_groups for layer in g.albert_layers]
    else:
        outputs = [attention.out_lin for attention in model.transformer.attentions]
        seconds = [ffn.lin2 for ffn in model.transformer.ffns]
    for i, gone in heads.items():
        for head in gone:
            outputs[i].weight.data[:, 8 * head : 8 * head + 8] = 0
    for i, gone in neurons.items():
        seconds[i].weight.data[:, gone] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_without_heads_and_neurons_the_model_computes_what_it_does_where_they_are_silent(family, tmp_path):
    model, twin = model_of(family), model_of(family)
    heads, neurons = {0: [1, 3]}, {0: [0, 5, 7]}
    if family != "albert":
        heads, neurons = heads | {2: [0]}, neurons | {3: [1]}
    silence(twin, heads=heads, neurons=neurons)
    before = logits(model)
    hfc.prune_neurons(hfc.prune_heads(model, heads), neurons)
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-12)
    assert (before - logits(model)).abs().max() > 1e-9
    assert cuttable(model).attentions[0].num_heads == 2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), rtol=0, atol=1e-12)
    hfc.quantize(model, 8).save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_layers_with_weights_of_their_own_in_albert(tmp_path):
    """Two groups of two layers: four sets of weights."""
    model, twin = (model_of("albert", num_hidden_groups=2, inner_group_num=2) for _ in range(2))
    heads, neurons = {1: [0], 2: [1, 2]}, {3: [4]}
    silence(twin, heads=heads, neurons=neurons)
    hfc.prune_neurons(hfc.prune_heads(model, heads), neurons)
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="cannot be read by structure"):
        hfc.prune_layers(model, [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers(family, tmp_path):
    """ALBERT runs its layer fewer times. In XLM a layer goes that would hand on its input: all it adds is zero."""
    model, twin = model_of(family), model_of(family)
    if family == "albert":
        twin.config.num_hidden_layers = 3
    else:
        identity = lambda module, args, output: args[0]  # noqa: E731
        zeros = lambda module, args, output: (torch.zeros_like(args[0]),)  # noqa: E731
        twin.transformer.attentions[1].register_forward_hook(zeros)
        twin.transformer.ffns[1].register_forward_hook(lambda module, args, output: torch.zeros_like(args[0]))
        for norm in (twin.transformer.layer_norm1[1], twin.transformer.layer_norm2[1]):
            norm.register_forward_hook(identity)
    hfc.prune_layers(model, [0, 2, 3])
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-12)
    assert model.config.num_hidden_layers == 3 and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), rtol=0, atol=1e-12)
    for keep in ([], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="keep must name layers from 0 to 2"):
            hfc.prune_layers(model, keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_of_heads_and_neurons(family):
    """What is silent matters to no loss; of ALBERT's head the gates of all runs are one."""
    model = model_of(family)
    silence(model, heads={0: [2]}, neurons={0: [9]})
    batch = {**tiny_batch(model), "labels": torch.tensor([0, 1, 1])}
    heads, neurons = hfc.head_importance(model, [batch]), hfc.neuron_importance(model, [batch])
    assert heads[0, 2] == 0 and (heads[0, [0, 1, 3]] > 0).all()
    assert neurons[0, 9] == 0 and neurons[0, 8] > 0
    if family == "albert":
        example = {name: value[:1] for name, value in batch.items()}
        expected = _difference(model, example)
        found = hfc.head_importance(model, [example], normalize=False)[0, 0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def _difference(model: nn.Module, batch: dict) -> Tensor:
    """|d loss / d gate| of head 0 by a central difference of its output's columns, in all runs at once."""
    weight, losses = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.dense.weight, []
    with torch.no_grad():
        for factor in (1 + 1e-5, (1 - 1e-5) / (1 + 1e-5)):
            weight[:, :8] *= factor
            losses.append(model(**batch).loss)
    return (losses[0] - losses[1]).abs() / 2e-5


@pytest.mark.parametrize("family", ["xlm", "flaubert"])
def test_an_attention_that_needs_a_head_keeps_one(family):
    with pytest.raises(ValueError, match="attentions.1 cannot run without a head"):
        hfc.prune_heads(model_of(family), {1: range(4)})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_needs_layers_as_modules_says_why_it_cannot(family):
    model = model_of(family)
    for refused in (
        lambda: hfc.make_student(model, num_hidden_layers=2),
        lambda: hfc.neuron_importance(model, [tiny_batch(model)], method="entropy"),
        lambda: hfc.head_importance(model, [tiny_batch(model)], method="confidence"),
    ):
        with pytest.raises(ValueError, match="cannot be read by structure: .*hfc.prune_heads"):
            refused()
