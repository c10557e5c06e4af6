"""The wish, what structures cost, and the stages that follow: by hand."""

import pytest
import torch
from helpers import tiny_batch, tiny_model

from hf_compress.measuring.counting import num_parameters
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.budget import choose, cut
from hf_compress.pruning.targets import StructureTimes, prune_to_size, prune_to_time, stored_megabytes
from hf_compress.pruning.units import units
from hf_compress.recipe import Recipe
from hf_compress.recipe.options import RecipeError
from hf_compress.shrinking.plan import LayerSizes, Texts, first_target, next_target, rarest_kept, stages, whole_layers
from hf_compress.shrinking.times import MeasuredTimes, cut_evenly, shapes_near, solved
from hf_compress.shrinking.wish import Wish

TIMES = StructureTimes(fixed=1.0, heads=2.0, neurons=3.0, rest=0.5)
MEASURED = MeasuredTimes(60.0, TIMES, "a machine")
MANY, FEW = Texts(2000, 0), Texts(1000, 9000)


def loader(model):
    batch = tiny_batch(model)
    return [{**batch, "labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}]


def test_a_wish_is_one_figure():
    assert Wish.of(speedup=10, size_mb=None) == Wish("speedup", 10.0)
    for given, message in [
        ({}, "got nothing"),
        ({"speedup": 2.0, "size_mb": 3.0}, "got speedup=2, size_mb=3"),
        ({"speedup": 1.0}, "above 1: got 1"),
        ({"size_mb": -1.0}, "above 0: got -1"),
        ({"latency_ms": float("nan")}, "above 0: got nan"),
    ]:
        with pytest.raises(RecipeError, match=message):
            Wish.of(**given)


def test_a_wish_is_met_within_a_tenth_and_a_loss_exactly():
    assert Wish("speedup", 10).is_met(9.1) and not Wish("speedup", 10).is_met(8.9)
    assert Wish("size_mb", 10).is_met(10.9) and not Wish("size_mb", 10).is_met(11.1)
    assert Wish("accuracy_loss", 1).is_met(1.0) and not Wish("accuracy_loss", 1).is_met(1.01)


def test_times_are_solved_from_four_structures():
    shapes = [(6, 1.0, 1.0), (2, 1.0, 1.0), (6, 0.5, 1.0), (6, 1.0, 0.5)]
    times = [TIMES.of(n, heads=h, neurons=m) for n, h, m in shapes]
    assert times == [34.0, 12.0, 28.0, 25.0]
    found = solved(shapes, times)
    assert vars(found) == pytest.approx(vars(TIMES))
    noisy = solved(shapes, [34.0, 12.0, 35.0, 34.5])  # fewer heads slower: noise
    assert noisy.heads == 0.0 == noisy.neurons and noisy.rest == pytest.approx(5.5)


@pytest.mark.parametrize("share, depth, groups, shapes", [
    (1.7, 6, 12, [(6, 1, 1), (2, 1, 1), (6, 0.5, 1), (6, 1, 0.5)]),  # more than the whole takes
    (0.5, 6, 12, [(3, 1, 1), (6, 0.5, 0.5), (3, 0.5, 1), (3, 1, 0.5)]),
    (0.2, 6, 12, [(1, 1, 1), (6, 1 / 6, 0.2), (1, 0.5, 1), (1, 1, 0.5)]),  # heads go whole
    (0.01, 2, 12, [(1, 1, 1), (2, 1 / 6, 0.125), (1, 0.5, 1), (1, 1, 0.5)]),
    (0.6, 4, 3, [(2, 1, 1), (4, 2 / 3, 0.6), (2, 2 / 3, 1), (2, 1, 0.5)]),
    (0.6, 4, 1, [(2, 1, 1), (4, 1, 0.6), (2, 1, 1), (2, 1, 0.5)]),
])  # fmt: skip
def test_structures_that_are_measured_are_near_the_share_of_time_wanted(share, depth, groups, shapes):
    found = shapes_near(share, depth, groups)
    assert found == [pytest.approx(shape) for shape in shapes]
    times = [TIMES.of(n, heads=h, neurons=m) for n, h, m in found]
    parts = solved(found, times)
    if groups > 1:
        assert vars(parts) == pytest.approx(vars(TIMES))
    else:  # the one group of heads cannot be told from the rest
        assert parts.heads == 0.0 and parts.layer == pytest.approx(TIMES.layer)
    noisy = solved(found, [times[0], 2 * times[0], times[2] + 1.0, times[3]])
    assert noisy.of(found[0][0]) == pytest.approx(times[0]) and min(vars(noisy).values()) >= 0.0


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_structures_to_measure_have_the_shape_asked_for(family):
    small = anatomy(cut_evenly(tiny_model(family), 2, 0.5, 0.25))
    whole = anatomy(tiny_model(family))
    assert len(small.layers) == 2
    assert [a.num_heads for a in small.attentions] == [a.num_heads // 2 for a in whole.attentions[:2]]
    assert [p.feed_forward.num_neurons for p in small.layers] == [
        p.feed_forward.num_neurons // 4 for p in whole.layers[:2]
    ]


@pytest.mark.parametrize("target", [19.0, 12.0, 4.0])
def test_pruning_to_a_time_ends_just_below_it(target):
    model = tiny_model()
    prune_to_time(model, loader(model), TIMES, target)
    parts, whole = anatomy(model), anatomy(tiny_model())
    heads, neurons = whole.layers[0].attention.num_heads, whole.layers[0].feed_forward.num_neurons
    left = TIMES.fixed + sum(
        TIMES.rest + TIMES.heads * p.attention.num_heads / heads + TIMES.neurons * p.feed_forward.num_neurons / neurons
        for p in parts.layers
    )
    assert left <= target + 1e-6
    assert left > target - TIMES.layer  # no more than one piece too much
    assert model(**tiny_batch(model)).logits.isfinite().all()


def test_a_time_that_is_there_changes_nothing_and_one_that_cannot_be_had_is_refused():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_to_time(model, loader(model), TIMES, TIMES.of(4))
    with pytest.raises(ValueError, match="cannot be reached"):
        prune_to_time(model, loader(model), TIMES, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_free_heads_stay():
    """Where heads cost nothing, only neurons and layers go."""
    model = tiny_model()
    prune_to_time(model, loader(model), StructureTimes(1.0, 0.0, 3.0, 0.0), 8.0)
    whole = anatomy(tiny_model()).layers[0].attention.num_heads
    assert {a.num_heads for a in anatomy(model).attentions} == {whole}


def test_pruning_to_a_size():
    model = tiny_model()
    whole = stored_megabytes(model, 8, 4)
    tables = model.get_input_embeddings().weight.numel()
    assert whole == pytest.approx((sum(p.numel() for p in model.parameters()) - tables / 2) / 1e6)
    prune_to_size(model, loader(model), 0.7 * whole, embedding_bits=4)
    layer = sum(p.numel() for p in anatomy(tiny_model()).layers[0].module.parameters()) / 1e6
    assert 0.7 * whole - layer < stored_megabytes(model, 8, 4) <= 0.7 * whole  # a layer goes as one piece


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65])
def test_a_layer_that_goes_last_makes_room_for_what_matters_more(share):
    model = tiny_model("bert", num_hidden_layers=4, intermediate_size=256)
    before, surplus = num_parameters(model), int(share * num_parameters(model))
    pieces = sorted(units(model, loader(model), None), key=lambda unit: unit.importance / max(unit.cost, 1))
    chosen = choose(anatomy(model), pieces, surplus)
    gone = {unit.layer for unit in chosen if unit.is_layer}
    spare = before - num_parameters(cut(model, chosen)) - surplus
    assert spare >= 0 and all(unit.cost > spare for unit in chosen if not unit.is_layer and unit.layer not in gone)


def test_the_stages_are_a_recipe():
    speed = Wish("speedup", 10.0)
    target = first_target(speed, MEASURED)
    assert target == 6.0
    written = stages(speed, target, FEW, MEASURED, fine_tunes=True)
    assert [stage.name for stage in Recipe(written).stages] == [
        "teacher", "vocabulary", "structure", "student", "packed"
    ]  # fmt: skip
    assert written[2]["prune"] == {
        "method": "time", "name": "structure", "milliseconds": 6.0, "fixed": 1.0, "heads": 2.0, "neurons": 3.0,
        "rest": 0.5,
    }  # fmt: skip
    assert written[3]["distil"]["alpha"] == 1.0  # few labels: the teacher's answers
    assert stages(speed, target, MANY, MEASURED, fine_tunes=False)[2]["distil"]["alpha"] == 0.7
    size = stages(Wish("size_mb", 3.0), 3.0, MANY, None, fine_tunes=False)
    assert size[1]["prune"]["method"] == "size" and size[-1]["quantize"]["embedding_bits"] == 4
    assert stages(Wish("accuracy_loss", 1.0), 0.5, MANY, None, fine_tunes=False)[1]["prune"]["sparsity"] == 0.5
    for each in (size, written):
        assert Recipe(each).stages


def test_a_missed_wish_aims_at_what_was_measured():
    assert next_target(Wish("speedup", 10.0), 6.0, 8.0) == pytest.approx(4.8)
    assert next_target(Wish("latency_ms", 6.0), 6.0, 8.0) == pytest.approx(4.5)
    assert next_target(Wish("size_mb", 3.0), 3.0, 4.0) == pytest.approx(2.25)
    assert next_target(Wish("accuracy_loss", 1.0), 0.5, 2.0) == 0.25


def test_what_cannot_be_had_is_said_with_what_can():
    with pytest.raises(RecipeError, match=r"100.0x as fast cannot be had here.*The most is 28.2x as fast"):
        first_target(Wish("speedup", 100.0), MEASURED)
    with pytest.raises(RecipeError, match="The most is 2.12 ms for a text"):
        first_target(Wish("latency_ms", 1.0), MEASURED)


def test_more_than_was_asked_for_is_tried_again_and_the_nearest_that_has_it_stays():
    speed, loss = Wish("speedup", 10), Wish("accuracy_loss", 1)
    assert speed.is_near(10.9) and speed.is_near(9.1) and not speed.is_near(12.0) and not speed.is_near(8.0)
    assert loss.is_near(-5.0) and not loss.is_near(1.1)
    assert sorted([8.0, 15.0, 9.2, 11.0], key=speed.distance) == [9.2, 11.0, 15.0, 8.0]
    assert min([1.5, 0.9], key=loss.distance) == 0.9 and min([1.5, 2.0], key=loss.distance) == 1.5


def test_rare_tokens_go_where_their_table_would_take_more_than_half_of_a_size():
    occur = {1: 20_000, 2: 15_000, 3: 9_000, 4: 7_000}  # tokens that occur so often

    def kept(megabytes, others=0):
        return rarest_kept(Wish("size_mb", megabytes), lambda count: occur.get(count, 2_000), width=400, others=others)

    assert [kept(size) for size in (8.0, 7.9, 6.0, 5.9, 3.0, 2.0)] == [1, 2, 2, 3, 4, 6]  # 4 bit: 4, 3, 1.8, 1.4 MB
    assert kept(2.0, others=1_500_000) == 6
    with pytest.raises(
        RecipeError, match=r"2\.0 MB cannot be had here: 2,000 tokens, those that occur 6 times, .* 2\.10 MB"
    ):
        kept(2.0, others=1_700_000)
    with pytest.raises(RecipeError, match="those that occur 32 times"):
        kept(0.3)


def test_an_embedder_keeps_whole_layers():
    parts = LayerSizes(number=6, layer=2.0, rest=1.0)
    speed, size, loss = Wish("speedup", 10.0), Wish("size_mb", 8.0), Wish("accuracy_loss", 1.0)
    assert [whole_layers(speed, t, MEASURED, parts) for t in (6.5, 12.0, 16.8, 17.1, 99.0)] == [1, 2, 2, 3, 6]
    assert [whole_layers(size, t, None, parts) for t in (3.0, 8.0, 50.0)] == [1, 3, 6]
    assert whole_layers(loss, 0.5, None, parts) == 3
    written = stages(size, 8.0, MANY, None, task="embeddings", parts=parts)
    assert [next(iter(stage)) for stage in written] == ["prune", "distil", "quantize"]
    assert written[1]["distil"]["num_hidden_layers"] == 3 and written[1]["distil"]["method"] == "embeddings"
    assert [next(iter(s)) for s in stages(speed, 12.0, MANY, MEASURED, task="embeddings", parts=parts)] == [
        "distil", "quantize"
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"an embedder keeps whole layers, and one takes 6\.50 ms where 5\.00"):
        whole_layers(speed, 5.0, MEASURED, parts)
    with pytest.raises(RecipeError, match=r"one takes 3\.00 MB where 2\.00"):
        whole_layers(size, 2.0, None, parts)


@pytest.mark.parametrize("wish", [Wish("latency_ms", 6.0), Wish("size_mb", 6.0)], ids=str)
@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "seq2seq-lm"])
def test_a_language_model_follows_the_one_that_came_in(task, wish):
    """With its own vocabulary: with a cut one, texts have other tokens, and what was made could not be compared."""
    written = stages(wish, 6.0, MANY, MEASURED, task=task)
    assert [next(iter(stage)) for stage in written] == ["prune", "distil", "quantize"]
    assert "vocabulary" not in [stage.get("prune", {}).get("method") for stage in written]
    assert written[1]["distil"]["teacher"] == "input" and "cache_teacher" not in written[1]["distil"]
    begun = stages(wish, 6.0, MANY, MEASURED, task=task, fine_tunes=True)  # had another head
    assert begun[2]["distil"]["teacher"] == "teacher" == begun[0]["fine-tune"]["name"]
    assert Recipe(written).stages
