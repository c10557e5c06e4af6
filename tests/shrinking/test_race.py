"""Structures of one cost learn beside one another, and the best of them goes on: by hand, and to its end."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_batch, tiny_model
from recipe.task_files import CASES, model_of, source_of
from recipe_run import reviews, tiny_folder
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.measuring.counting import num_parameters
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning import units
from hf_compress.pruning.targets import StructureTimes, prune_to_size, prune_to_time, stored_megabytes
from hf_compress.recipe import Recipe
from hf_compress.shrinking import race
from hf_compress.shrinking import run as shrinking
from hf_compress.shrinking.plan import (
    LayerSizes,
    Texts,
    costs,
    may_have_ranges,
    may_race,
    planned_steps,
    stages,
    with_changes,
)
from hf_compress.shrinking.race import BY_WORTH, depths, nearest_depth, trial, trial_steps, winner
from hf_compress.shrinking.times import MeasuredTimes, _measure
from hf_compress.shrinking.told import plan_text
from hf_compress.shrinking.wish import Wish

TIMES = StructureTimes(fixed=1.0, heads=2.0, neurons=3.0, rest=0.5)
SPEED, MANY = Wish("speedup", 10.0), Texts(2000, 0)
QUICK = {"max_steps": 4, "per_device_train_batch_size": 8, "save_steps": 2, "disable_tqdm": True, "bf16": False,
         "use_cpu": True}  # fmt: skip


def loader(model):
    batch = tiny_batch(model)
    writes = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    labels = batch["input_ids"] if writes else torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    return [{**batch, "labels": labels}]


def widths(model):
    parts = anatomy(model)
    return [a.num_heads for a in parts.attentions], [layer.feed_forward.num_neurons for layer in parts.layers]


@pytest.mark.parametrize("family", ["bert", "mpnet", "llama", "gpt2"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_so_many_layers_stay_and_all_of_them_as_wide(family, layers):
    wide = {"n_layer": 4, "n_inner": 256} if family == "gpt2" else {"num_hidden_layers": 4, "intermediate_size": 256}
    model = tiny_model(family, **wide)
    depth = len(anatomy(model).layers)
    whole = num_parameters(model)
    inner = sum(num_parameters(layer.module) for layer in anatomy(model).layers)
    kept = inner * layers / depth * 0.7
    hfc.prune(model, loader(model), sparsity=(inner - kept) / whole, num_layers=layers)
    heads, neurons = widths(model)
    assert len(anatomy(model).layers) == layers
    assert len(set(heads)) == 1 and max(neurons) - min(neurons) <= layers * 256 // 64  # what may stay comes back
    each = inner / depth
    assert kept - each < sum(num_parameters(layer.module) for layer in anatomy(model).layers) <= kept + 1
    assert model(**tiny_batch(model)).logits.isfinite().all()


def test_a_time_and_a_size_are_met_with_so_many_layers():
    model = tiny_model(num_hidden_layers=4, intermediate_size=256)
    prune_to_time(model, loader(model), TIMES, TIMES.of(3, heads=0.5, neurons=0.5), num_layers=3)
    heads, neurons = widths(model)
    whole_heads, whole_neurons = widths(tiny_model(num_hidden_layers=4, intermediate_size=256))
    assert len(heads) == 3
    taken = [
        TIMES.of(1, heads=h / whole_heads[0], neurons=n / whole_neurons[0]) - 1.0
        for h, n in zip(*widths(model), strict=True)
    ]
    assert 1.0 + sum(taken) <= TIMES.of(3, heads=0.5, neurons=0.5) + 1e-6
    other = tiny_model(num_hidden_layers=4, intermediate_size=256)
    goal = 0.6 * stored_megabytes(other, 8, 4)
    prune_to_size(other, loader(other), goal, embedding_bits=4, num_layers=4)
    assert len(anatomy(other).layers) == 4 and stored_megabytes(other, 8, 4) <= goal


def test_so_many_layers_stay_also_where_all_would_be_small_enough():
    model = tiny_model(num_hidden_layers=4)
    assert len(anatomy(prune_to_time(model, loader(model), TIMES, 99.0, num_layers=3)).layers) == 3
    assert len(anatomy(prune_to_size(model, loader(model), 99.0, num_layers=2)).layers) == 2
    assert widths(model) == widths(tiny_model(num_hidden_layers=2))


def test_layers_that_go_by_their_place_are_not_tried_out(monkeypatch):
    """What takes most of the time of a structure is not done again for each of a race."""
    model, whole = tiny_model(num_hidden_layers=4), num_parameters(tiny_model(num_hidden_layers=4))
    monkeypatch.setattr(units, "_layer_worths", lambda *args: pytest.fail("tried out"))
    hfc.prune(model, loader(model), sparsity=0.4, num_layers=2)
    prune_to_time(model, loader(model), TIMES, TIMES.of(2, heads=0.5, neurons=0.5), num_layers=2)
    assert num_parameters(model) < 0.6 * whole and len(anatomy(model).layers) == 2


@pytest.mark.parametrize("metric", ["parameters", "multiply_adds", "latency"])
def test_a_number_of_layers_is_checked_before_anything_is_measured(metric, monkeypatch):
    monkeypatch.setattr(units, "mean_absolute_gradients", lambda *args: pytest.fail("measured"))
    model = tiny_model(num_hidden_layers=4)
    for layers in (0, 5):
        with pytest.raises(ValueError, match=f"must lie between 1 and 4, got {layers}"):
            hfc.prune(model, loader(model), sparsity=0.5, metric=metric, num_layers=layers)
    with pytest.raises(ValueError, match="num_layers=2 is of models with one stack, and this one has 2"):
        prune_to_size(tiny_model("t5"), [], 1.0, num_layers=2)


def test_layers_that_cannot_stay_are_refused_and_nothing_changes():
    model = tiny_model(num_hidden_layers=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for layers, message in ((0, "between 1 and 4, got 0"), (5, "between 1 and 4, got 5")):
        with pytest.raises(ValueError, match=message):
            prune_to_time(model, loader(model), TIMES, 6.0, num_layers=layers)
    with pytest.raises(ValueError, match="So little cannot be left of 4 layers, thin as they may be: let fewer stay"):
        prune_to_time(model, loader(model), TIMES, 3.2, num_layers=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_depths_go_from_whole_layers_to_the_thinnest():
    of = TIMES.of
    assert depths(TIMES, of(6), 6) == []  # nothing has to be cut
    assert depths(TIMES, of(2), 12) == [2, 6, 9]  # 10 of (0.5 + 5 / 8) are 11.25, and 11 are left
    assert depths(TIMES, of(1), 6) == [1, 3, 4]
    assert depths(TIMES, of(1, heads=0.5, neurons=0.5), 6) == [1, 2]
    assert depths(TIMES, 1.2, 6) == []  # not even one
    free = StructureTimes(fixed=1.0, heads=0.0, neurons=5.0, rest=0.0)
    assert depths(free, 6.0, 6) == [1, 3, 6]
    assert nearest_depth(4, TIMES, of(1, heads=0.5, neurons=0.5), 6) == 2
    assert nearest_depth(2, TIMES, of(4), 6) == 4 and nearest_depth(2, TIMES, of(6), 6) is BY_WORTH
    assert nearest_depth(BY_WORTH, TIMES, of(1), 6) is BY_WORTH


def test_a_race_is_a_tenth_of_the_steps_and_none_where_that_is_little():
    assert [trial_steps(steps) for steps in (4, 199, 200, 1470, 9000)] == [0, 0, 20, 147, 150]
    assert planned_steps(MANY, {}) == 378 and planned_steps(MANY, {"num_train_epochs": 0.5}) == 32
    assert planned_steps(MANY, {"max_steps": 7}) == 7 and planned_steps(Texts(0, 64_000), {}) == 4000


def test_what_has_no_structures_to_choose_from_does_not_race():
    parts = LayerSizes(6, 2.0, 1.0)
    assert may_race(SPEED, "sequence-classification", parts) and may_race(Wish("size_mb", 3), "causal-lm", parts)
    assert not may_race(SPEED, "embeddings", parts) and not may_race(
        Wish("accuracy_loss", 1), "token-classification", parts
    )
    assert not may_race(Wish("size_mb", 3), "seq2seq-lm", LayerSizes(6, 2.0, 1.0, stacks=2))
    assert vars(costs(Wish("size_mb", 3), None, parts)) == {"fixed": 1.0, "heads": 0.0, "neurons": 2.0, "rest": 0.0}


@pytest.mark.parametrize("has_ranges", [False, True])
def test_the_trial_is_the_recipe_up_to_a_short_training(has_ranges):
    written = stages(SPEED, 6.0, MANY, MeasuredTimes(60.0, TIMES, "a machine", has_ranges), layers=2)
    assert [next(iter(one)) for one in written][2:] == ["distil", "together" if has_ranges else "quantize"]
    short = trial(written, 30)
    assert [next(iter(one)) for one in short] == ["prune", "prune", "distil"] and short[:2] == written[:2]
    options = short[-1]["distil"]
    assert options["max_steps"] == 30 and options["logging_steps"] == 15 and not options["cache_teacher"]
    assert options["teacher"] == "vocabulary" and options["name"] == "trial"
    assert written[1]["prune"]["num_layers"] == 2
    for each in (written, short):
        assert Recipe(each).stages


def test_ranges_are_trained_with_the_student_where_they_are_faster():
    written = stages(SPEED, 6.0, MANY, MeasuredTimes(60.0, TIMES, "a machine", True))
    student, rounding = written[-1]["together"]
    assert student["distil"]["num_train_epochs"] == 1 and rounding["quantize"]["method"] == "qat"
    assert student["distil"]["learning_rate"] == pytest.approx(3e-5) and student["distil"]["teacher"] == "vocabulary"
    assert rounding["quantize"]["symmetric"] and rounding["quantize"]["group_size"] == -1
    assert [may_have_ranges(task) for task in ("token-classification", "embeddings", "masked-lm")] == [
        True,
        False,
        False,
    ]


class Runtime:
    """Takes milliseconds by a table, `cached` of them below 10: whole with and without ranges, then four structures."""

    is_exported = True

    def __init__(self, with_ranges, cached=1.0):
        self.with_ranges, self.cached, self.asked = with_ranges, cached, []

    def served(self, model, shape, *, ranges):
        if ranges and self.with_ranges is None:
            raise ValueError("No calibration input reached ['pooler'].")
        self.asked.append((shape, ranges))
        milliseconds = TIMES.of(shape[0] or 4, heads=shape[1], neurons=shape[2]) * (self.with_ranges if ranges else 1.0)
        return milliseconds * (self.cached if milliseconds < 10 else 1.0)

    def milliseconds(self, models):
        return [100.0, *models[1:]]


@pytest.mark.parametrize("share, faster", [(0.5, True), (0.97, False), (1.2, False), (None, False)])
def test_ranges_stay_where_they_are_faster(share, faster):
    """Structures are measured as they will be served; what has no ranges is served without."""
    runtime, model = Runtime(share), tiny_model(num_hidden_layers=4)
    times = _measure(runtime, model, True, "here")
    assert times.has_ranges is faster and [ranges for _, ranges in runtime.asked[-4:]] == [faster] * 4
    assert vars(times.structure) == pytest.approx({n: t * (share if faster else 1) for n, t in vars(TIMES).items()})
    runtime.asked.clear()
    assert not _measure(runtime, model, False, "here").has_ranges and len(runtime.asked) == 5


@pytest.mark.parametrize(
    "wish, part", [(Wish("speedup", 20), 0.5), (Wish("latency_ms", 5.0), 0.5), (Wish("speedup", 6), 1.0)]
)
def test_structures_that_are_measured_take_about_the_time_wanted(wish, part):
    """Of a runtime in which what takes little, whose weights stay in a cache, takes half of that."""
    runtime = Runtime(None, cached=0.5)
    times = _measure(runtime, tiny_model(num_hidden_layers=4), True, "here", wish)
    assert times.original == 100.0 and times.whole == TIMES.of(4)
    assert vars(times.structure) == pytest.approx({name: part * time for name, time in vars(TIMES).items()})


def test_changes_reach_what_trains_ranges_in_their_share():
    written = stages(SPEED, 6.0, MANY, MeasuredTimes(60.0, TIMES, "a machine", True))
    changes = {"num_train_epochs": 3, "max_steps": 20, "learning_rate": 1e-3, "cache_teacher": True, "bf16": False}
    *others, last = with_changes(written, changes)
    assert {name: others[-1]["distil"][name] for name in changes} == changes
    told = {"num_train_epochs": 0.5, "max_steps": 4, "learning_rate": 1e-4, "cache_teacher": False, "bf16": False}
    assert {name: last["together"][0]["distil"][name] for name in told} == pytest.approx(told)
    assert last["together"][1] == written[-1]["together"][1]
    assert with_changes(written, {"max_steps": -1})[-1]["together"][0]["distil"]["max_steps"] == -1


def recipes(losses, **validation):
    """Recipes that end with these losses, or in an error; of `values` on `texts` by `metric`, if they are given."""

    def recipe(number):
        def run(output):
            if isinstance(losses[number], Exception):
                raise losses[number]
            figures = {"last_losses": {"loss": losses[number]}}
            if validation:
                figures["validation"] = {**validation, "value": validation["values"][number]}
            return SimpleNamespace(stages=[{"figures": figures}])

        return SimpleNamespace(run=run)

    return recipe


def test_the_least_loss_wins_and_what_cannot_be_cut_is_left_out(tmp_path, caplog):
    assert winner([2, 4], recipes({BY_WORTH: 0.5, 2: 0.4, 4: 0.6}), tmp_path) == 2
    assert winner([2, 4], recipes({BY_WORTH: 0.3, 2: 0.4, 4: 0.6}), tmp_path) is BY_WORTH
    caplog.clear()
    assert winner([1, 2], recipes({BY_WORTH: 0.5, 1: 0.45, 2: ValueError("thin as they may be")}), tmp_path) == 1
    assert "2 layers, evenly: left out: thin as they may be" in caplog.text and "best: 1 layer, evenly" in caplog.text
    with pytest.raises(ValueError, match="the wish"):
        winner([1], recipes({BY_WORTH: ValueError("the wish"), 1: 0.1}), tmp_path)


@pytest.mark.parametrize("metric, texts, best", [
    ("accuracy", 1000, 6), ("entity F1", 1000, 6),  # 0.790 lies more than a standard error below 0.803, 0.799 does not
    ("accuracy", 40, BY_WORTH),  # 0.06: nothing is told apart
    ("Pearson correlation", 1000, BY_WORTH), ("log-likelihood per token", 1000, BY_WORTH),  # no shares of answers
])  # fmt: skip
def test_little_loss_on_texts_that_the_teacher_knows_does_not_beat_right_answers(metric, texts, best, tmp_path):
    """Figures of a race on film reviews: at its end the six layers had 84.9%, the choice by worth 83.9."""
    losses = {BY_WORTH: 0.753, 3: 0.927, 4: 0.820, 6: 0.797}
    values = {BY_WORTH: 0.790, 3: 0.759, 4: 0.799, 6: 0.803}
    assert winner([3, 4, 6], recipes(losses, metric=metric, texts=texts, values=values), tmp_path) == best


def test_a_plan_tells_of_the_race():
    written = stages(SPEED, 6.0, MANY, MeasuredTimes(60.0, TIMES, "a machine", True), layers=2)
    told = plan_text(SPEED, 6.0, None, "openvino", "sequence-classification", MANY, written, [1, 2, 4], 37)
    assert "37 steps each by worth over cost, and evenly with 1, 2 and 4 layers" in " ".join(told.split())
    assert "cut structure, distil, 8 bit with trained ranges, export to openvino" in " ".join(told.split())
    assert all(len(line) <= 80 for line in told.splitlines())
    one = plan_text(SPEED, 6.0, None, "openvino", "sequence-classification", MANY, written, [1], 37)
    assert "evenly with 1 layer; the best goes on" in " ".join(one.split())


@pytest.mark.parametrize("has_ranges", [False, True])
def test_the_winner_goes_on_to_the_end(has_ranges, tmp_path, monkeypatch):
    """Three layers win, and what is exported has three; with ranges, its inputs have one each."""
    pytest.importorskip("openvino")
    times = MeasuredTimes(30.0, StructureTimes(1.0, 2.0, 3.0, 0.5), "a machine", has_ranges)
    monkeypatch.setattr(shrinking, "measured_times", lambda *args, **kwargs: times)
    monkeypatch.setattr(shrinking, "MEASURING", {"latency_rounds": 2, "throughput_rounds": 2, "isolate": False})
    monkeypatch.setattr(shrinking, "PASSES", 1)
    monkeypatch.setattr(race, "LEAST", 1)
    monkeypatch.setattr(race, "SHARE", 0.5)
    seen = []

    def first_even(numbers, recipe, output):
        seen.extend(numbers)
        return winner([numbers[1]], lambda n: recipe(n) if n else recipes({BY_WORTH: 99.0})(n), output)

    monkeypatch.setattr(shrinking, "winner", first_even)
    model = tiny_folder(tmp_path / "model")
    data = {"source": str(reviews(tmp_path / "r.csv")), "max_length": 16}
    done = hfc.shrink(model, data, output=tmp_path / "out", speedup=3.0, runtime="openvino", changes=QUICK)
    assert seen[1] == 3 and (done.model / "openvino_model.xml").is_file()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "run" / "model")
    assert len(anatomy(small).layers) == 3
    settings = json.dumps(small.config.quantization_config if has_ranges else {})
    assert ("activation" in settings) == has_ranges
    assert ("FakeQuantize" in (done.model / "openvino_model.xml").read_text(encoding="utf-8")) == has_ranges


@pytest.mark.parametrize("goal", [
    {"method": "budget", "sparsity": 0.3}, {"method": "size", "megabytes": 1.0, "bits": 8},
    {"method": "time", "milliseconds": 12.0, "fixed": 1.0, "heads": 2.0, "neurons": 3.0, "rest": 0.5},
], ids=lambda goal: goal["method"])  # fmt: skip
def test_a_recipe_says_how_many_layers_stay(goal, tmp_path):
    stages = [{"prune": {**goal, "num_layers": 2, "scoring_examples": 8, "scoring_batch_size": 4}}]
    data = {"source": str(reviews(tmp_path / "r.csv")), "max_length": 16}
    made = Recipe(stages, model=tiny_folder(tmp_path / "model"), data=data).run(tmp_path / "out")
    assert len(anatomy(AutoModelForSequenceClassification.from_pretrained(made.model)).layers) == 2


BY_TASK = {case.task: case for case in reversed(CASES)}


@pytest.mark.parametrize(
    "task",
    [pytest.param(t, marks=[pytest.mark.long] * (t != "question-answering")) for t in BY_TASK if t != "seq2seq-lm"],
)
def test_every_task_races_and_trains_its_ranges(task, tmp_path, monkeypatch):
    times = MeasuredTimes(30.0, StructureTimes(1.0, 2.0, 3.0, 0.5), "a machine", may_have_ranges(task))
    monkeypatch.setattr(shrinking, "measured_times", lambda *args, **kwargs: times)
    monkeypatch.setattr(shrinking, "MEASURING", {"latency_rounds": 2, "throughput_rounds": 2, "isolate": False})
    monkeypatch.setattr(shrinking, "PASSES", 1)
    monkeypatch.setattr(race, "LEAST", 1)
    monkeypatch.setattr(race, "SHARE", 0.5)
    case = BY_TASK[task]
    model, data = model_of(case, tmp_path / "begin"), {"source": str(source_of(case, tmp_path / "data"))}
    options = dict(zip((name.removeprefix("--") for name in case.options[::2]), case.options[1::2], strict=True))
    megabytes = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
    wish = {"size_mb": megabytes / 5} if task == "causal-lm" else {"speedup": 3.0}
    done = hfc.shrink(model, data | options | {"max_length": 16}, output=tmp_path / "out", task=task, changes=QUICK,
                      **wish)  # fmt: skip
    settings = json.dumps(case.auto_class.from_pretrained(done.model).config.quantization_config)
    assert ("activation_range" in settings or "static" in settings) == may_have_ranges(task), settings
    assert len(list((tmp_path / "out" / "run" / "stages").glob("*-trial-*"))) > 1
