"""A budget is reached, by the pieces that are worth least for what they cost."""

import pytest
import torch
from helpers import TASKS, default_task, tiny_batch, tiny_model
from silence import logits

import hf_compress as hfc
from hf_compress.measuring.counting import multiply_adds, num_parameters
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.budget import choose
from hf_compress.pruning.units import Unit, units
from hf_compress.recipe.one_shot import BudgetOptions
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

FAMILIES = ["bert", "gpt2", "llama", "modernbert", "bart", "deberta-v2", "gemma3_text"]


def labelled(model) -> list[dict]:
    batch = tiny_batch(model)
    if default_task(model.config.model_type) == "classification":
        return [{**batch, "labels": torch.tensor([0, 1, 0])}]
    return [{**batch, "labels": batch["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]}]


def count(model, metric: str) -> int:
    if metric == "parameters":
        return num_parameters(model)
    batch = {key: value[:1] for key, value in tiny_batch(model, padding=False, length=10).items()}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return multiply_adds(model, batch)


@pytest.mark.parametrize("metric", ["parameters", "multiply_adds"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_costs_what_its_removal_saves(family, metric):
    pieces = units(tiny_model(family), labelled(tiny_model(family)), None if metric == "parameters" else 10)
    heads = next(unit for unit in pieces if unit.heads and unit.layer == 2)
    neurons = next(unit for unit in pieces if unit.neurons and unit.layer == 1)
    layer = next(unit for unit in pieces if unit.is_layer and unit.layer == 3)
    whole = count(tiny_model(family), metric)
    gone = [head for _, head in heads.heads]
    saved = whole - count(prune_heads(tiny_model(family), {heads.heads[0][0]: gone}), metric)
    if family == "deberta-v2" and metric == "multiply_adds":  # its products with positions go as well, uncounted
        assert saved > heads.cost
        return
    assert saved == heads.cost
    assert whole - count(prune_neurons(tiny_model(family), {1: neurons.neurons}), metric) == neurons.cost
    assert whole - count(prune_layers(tiny_model(family), [0, 1, 2]), metric) == layer.cost


@pytest.mark.parametrize("sparsity", [0.1, 0.3])
@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_the_share_is_reached_by_no_more_than_a_piece(family, sparsity, tmp_path):
    model = tiny_model(family)
    whole = num_parameters(model)
    pieces = units(model, labelled(model), None)
    assert hfc.prune(model, labelled(model), sparsity=sparsity) is model
    left = num_parameters(model)
    assert sparsity * whole - 1 <= whole - left <= sparsity * whole + max(unit.cost for unit in pieces)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(TASKS[default_task(family)].from_pretrained(tmp_path)), logits(model))


def test_multiply_adds_are_reached():
    model = tiny_model("bert")
    whole = count(model, "multiply_adds")
    hfc.prune(model, labelled(model), sparsity=0.5, metric="multiply_adds", sequence_length=10)
    assert count(model, "multiply_adds") <= 0.5 * whole


def test_latency_is_reached_on_a_clock_that_counts_layers(monkeypatch):
    """A layer takes a second here, whatever is in it."""
    model = tiny_model("bert")

    def ratio(candidate, model, batch) -> float:
        return len(anatomy(candidate).layers) / len(anatomy(model).layers)

    monkeypatch.setattr("hf_compress.pruning.budget._latency_ratio", ratio)
    hfc.prune(model, labelled(model), sparsity=0.25, metric="latency", sequence_length=10)
    assert len(anatomy(model).layers) <= 3


def test_a_layer_is_worth_the_change_of_each_examples_loss():
    model = tiny_model("bert").double()
    batch = labelled(model)[0]
    worth = next(unit.importance for unit in units(model, [batch], None) if unit.is_layer and unit.layer == 2)
    shorter = prune_layers(tiny_model("bert").double(), [0, 1, 3])
    examples = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    with torch.no_grad():
        changes = [abs(float(shorter(**example).loss - model(**example).loss)) for example in examples]
    assert worth == pytest.approx(sum(changes) / 3, rel=1e-9)


def test_pieces_go_in_the_order_of_worth_for_cost():
    parts = anatomy(tiny_model("bert"))
    cheap = Unit(0, ((0, 1),), (), cost=10, importance=0.1)
    poor = Unit(1, (), (4, 5), cost=10, importance=0.5)
    layer = Unit(2, (), (), cost=100, importance=8.0)
    inside = Unit(2, ((2, 0),), (), cost=10, importance=0.2)
    order = sorted([layer, poor, inside, cheap], key=lambda unit: unit.importance / unit.cost)
    assert choose(parts, order, 10) == [cheap]
    assert choose(parts, order, 25) == [cheap, inside, poor]
    assert choose(parts, order, 119) == [cheap, inside, poor, layer]  # 10 + 10 + 10 + (100 - 10)
    with pytest.raises(ValueError, match="have 120"):
        choose(parts, order, 121)


@pytest.mark.parametrize("surplus, layers, heads, neurons", [
    (200, {0, 1}, 0, 0), (270, {1, 3}, 1, 2), (300, {1, 3}, 2, 2), (350, {1, 3}, 3, 3), (351, {0, 1, 2}, 3, 1),
])  # fmt: skip
def test_one_layer_is_left_alone_only_where_two_would_be_too_narrow(surplus, layers, heads, neurons):
    """Four layers of 100, each of four heads of 15 and four bundles of 10, all worth more for their cost than it is."""
    parts = anatomy(tiny_model("bert", num_attention_heads=4))
    own = [Unit(i, ((i, j),), (), cost=15, importance=10.0 + j) for i in range(4) for j in range(4)]
    own += [Unit(i, (), (j,), cost=10, importance=9.0 + j) for i in range(4) for j in range(4)]
    pieces = [Unit(i, (), (), cost=100, importance=1.0) for i in range(4)] + own
    chosen = choose(parts, pieces, surplus)
    assert {unit.layer for unit in chosen if unit.is_layer} == layers
    inner = [unit for unit in chosen if unit.layer not in layers]
    assert 100 * len(layers) + sum(unit.cost for unit in inner) >= surplus
    for i in (set(range(4)) - layers) if heads else ():  # the same share of each, those worth least
        assert {unit.heads[0][1] for unit in inner if unit.layer == i and unit.heads} == set(range(heads))
        assert {unit.neurons[0] for unit in inner if unit.layer == i and unit.neurons} == set(range(neurons))


def test_something_of_each_stack_stays():
    model = tiny_model("bart")
    pieces = units(model, labelled(model), None)
    with pytest.raises(ValueError, match="cannot be reached"):
        hfc.prune(model, labelled(model), sparsity=0.99)
    everything = sum(unit.cost for unit in pieces if unit.is_layer)
    hfc.prune(model, labelled(model), sparsity=0.9 * everything / num_parameters(model))
    parts = anatomy(model)
    assert [len(stack.layers) >= 1 for stack in parts.stacks] == [True, True]
    assert all(any(layer.attentions[0].num_heads for layer in stack.layers) for stack in parts.stacks)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "Give sparsity, the share that goes"),
    (dict(sparsity=0.5, target=0.5), "Give sparsity, the share that goes"),
    (dict(sparsity=0), "between 0 and 1"),
    (dict(sparsity=1.0), "between 0 and 1"),
    (dict(sparsity=0.5, metric="watts"), "metric must be"),
], ids=str)  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        hfc.prune(model, labelled(model), **arguments)


def test_what_is_left_can_be_said_for_one_more_version():
    kept, gone = tiny_model("bert"), tiny_model("bert")
    with pytest.warns(FutureWarning, match="sparsity=0.25"):
        hfc.prune(kept, labelled(kept), target=0.75)
    hfc.prune(gone, labelled(gone), sparsity=0.25)
    assert num_parameters(kept) == num_parameters(gone) <= 0.75 * num_parameters(tiny_model("bert"))
    with pytest.warns(FutureWarning, match="sparsity=0.25"):
        assert BudgetOptions(target=0.75).sparsity == 0.25
    with pytest.raises(ValueError, match="share that goes"):
        BudgetOptions()
