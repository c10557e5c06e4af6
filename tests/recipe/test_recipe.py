"""A recipe runs from end to end, keeps what it has made, and goes on where it was stopped."""

import json

import pytest
import torch
from recipe_run import QUICK, TRAIN, reviews, tiny_folder
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.recipe import Recipe, RecipeError
from hf_compress.recipe.options import option_fields
from hf_compress.recipe.stages import KINDS
from hf_compress.recipe.store import Store
from hf_compress.recipe.training import Change

CHAIN = [
    {"fine-tune": TRAIN},
    {"prune": {"method": "vocabulary"}},
    {"prune": {"method": "structure", "layers": 0.5, "heads": 0.5, "neurons": 0.25}},
    {"distil": {"teacher": "vocabulary", "hints": "1:2,2:4", **TRAIN}},
    {"quantize": {"bits": 8, "embedding_bits": 8, "heads_too": True}},
    {"evaluate": {"models": "fine-tune,distil", **QUICK}},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    data = {"source": str(reviews(folder / "r.csv")), "max_length": 16}
    return {"model": tiny_folder(folder / "model"), "data": data, "folder": folder}


@pytest.fixture(scope="module")
def finished(work):
    recipe = Recipe(CHAIN, model=work["model"], data=work["data"])
    return recipe.run(work["folder"] / "out", command="hf-compress run test")


def test_a_chain_makes_a_smaller_model_and_a_report(finished):
    model = AutoModelForSequenceClassification.from_pretrained(finished.output / "model")
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size < 64
    assert model.config.id2label == {0: "neg", 1: "pos"}
    report = json.loads((finished.output / "report.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in report["entries"]] == ["fine-tune", "distil", "rtn"]
    assert report["command"] == "hf-compress run test"
    assert report["entries"][2]["byte_rate"] > report["entries"][1]["byte_rate"] > 1


def test_what_ran_before_is_kept_and_what_lies_below_a_change_runs_again(work, finished, monkeypatch):
    ran = []
    original = Change.run
    monkeypatch.setattr(Change, "run", lambda stage, w: ran.append(stage.name) or original(stage, w))
    recipe = Recipe(CHAIN, model=work["model"], data=work["data"])
    again = recipe.run(finished.output)
    assert ran == [] and [r["fingerprint"] for r in again.stages] == [r["fingerprint"] for r in finished.stages]
    changed = [*CHAIN[:4], {"quantize": {"bits": 4}}]
    Recipe(changed, model=work["model"], data=work["data"]).run(finished.output)
    assert ran == ["rtn"]
    loud = [{"fine-tune": {**TRAIN, "logging_steps": 1}}, *CHAIN[1:]]
    Recipe(loud, model=work["model"], data=work["data"]).run(finished.output)
    assert ran == ["rtn"], "how often a training logs changes nothing of what it makes"


def test_a_stopped_training_goes_on_and_ends_in_the_same_weights(work, finished, monkeypatch):
    from hf_compress.training.state import TrainingStateMixin

    class Stopped(Exception):
        pass

    def stop(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            raise Stopped
        return step(self, model, *args, **kwargs)

    step = TrainingStateMixin.training_step
    recipe = Recipe(CHAIN[:1], model=work["model"], data=work["data"])
    output = work["folder"] / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStateMixin, "training_step", stop)
        with pytest.raises(Stopped):
            recipe.run(output)
    (partial,) = (output / "stages").iterdir()
    assert partial.name.endswith(".partial") and not (output / "model").exists()
    steps = []
    monkeypatch.setattr(
        TrainingStateMixin, "training_step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k)
    )
    recipe.run(output)
    assert len(steps) == 2, "the first two steps were in a checkpoint"
    whole = load_file(finished.output / "stages" / finished.stages[0]["folder"] / "model" / "model.safetensors")
    resumed = load_file(output / "model" / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_kill_while_checkpoints_are_deleted_leaves_no_half_of_one(tmp_path, monkeypatch):
    """Without its random state a checkpoint would be resumed, and end in other weights."""
    store = Store(tmp_path)
    place = store.place(1, "fine-tune", "0" * 16)
    checkpoint = store.begin(place) / "trainer" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rng_state.pth").write_text("", encoding="utf-8")

    def killed_halfway(folder, **_):
        if folder.exists():
            next(folder.rglob("rng_state.pth")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.files.whole.shutil.rmtree", killed_halfway)
        with pytest.raises(KeyboardInterrupt):
            store.finish(place, {})
    again = store.begin(place)
    assert list(again.iterdir()) == []
    store.finish(place, {})
    assert [p.name for p in place.iterdir()] == ["stage.json"]


def test_a_damaged_stage_runs_again(work, finished):
    recipe = Recipe(CHAIN[:2], model=work["model"], data=work["data"])
    output = work["folder"] / "damaged"
    stages = recipe.run(output).stages
    weights = output / "stages" / stages[1]["folder"] / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    recipe.run(output)
    assert weights.read_bytes() == content
    record = weights.parents[1] / "stage.json"
    record.write_text("", encoding="utf-8")  # as a disk leaves it that lost its power
    recipe.run(output)
    assert json.loads(record.read_text(encoding="utf-8"))["name"] == "vocabulary"


def test_together_distils_prunes_and_quantizes_in_one_run(work, finished):
    teacher = finished.output / "stages" / finished.stages[0]["folder"] / "model"
    stages = [{"together": [
        {"distil": {"num_hidden_layers": 2, **TRAIN}},
        {"prune": {"method": "neurons", "sparsity": 0.5, "begin": 0.0, "num_updates": 2}},
        {"quantize": {"method": "qat", "bits": 8}},
    ]}]  # fmt: skip
    result = Recipe(stages, model=teacher, data=work["data"]).run(work["folder"] / "together")
    model = AutoModelForSequenceClassification.from_pretrained(result.model)
    assert model.config.num_hidden_layers == 2
    record = model.config.quantization_config
    widths = [model.bert.encoder.layer[i].intermediate.dense.out_features for i in range(2)]
    assert sum(widths) == 48, "half of the neurons of both layers"
    assert record["bits"] and model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


MISTAKES = [
    ([{"fine_tune": {}}], "Stage 1: the kind 'fine_tune' is not known. Did you mean 'fine-tune'"),
    ([{"distil": {"alhpa": 0.5}}], "Stage 1 .distil.: the option 'alhpa' is not known. Did you mean 'alpha'"),
    ([{"prune": {"method": "head"}}], "the method 'head' is not known. Did you mean 'heads'"),
    ([{"distil": {"alpha": "much"}}], "alpha must be a number, got 'much'"),
    ([{"distil": {"alpha": 2}}], "alpha is the share of the soft loss and must lie between 0 and 1"),
    ([{"quantize": {}}, {"distil": {}}], "Stage 2 .distil. changes or trains weights, but stage 1 packs them"),
    ([{"quantize": {"method": "qat"}}], "put both under `together:`"),
    ([{"together": [{"prune": {"method": "heads"}}, {"quantize": {"method": "qat"}}]}], "needs one fine-tune"),
    ([{"together": [{"distil": {}}, {"prune": {"method": "vocabulary"}}]}], "does not prune while training"),
    ([{"publish": {}}], "repo_id must be given"),
    ([], "at least one stage"),
    ("fine-tune", "stages must be a list"),
    ([{"fine-tune": {"name": "../x"}}], "letters, digits"),
    ([{"prune": {"method": "weights", "score": "taylor"}}], "must be one of magnitude, movement, wanda, got 'taylor'"),
    ([{"prune": {"method": "structure", "heads": 0.5, "head_score": "entropy"}}], "head_score must be one of gradient"),
    ([{"prune": {"method": "structure", "heads": 0.5, "neuron_score": "merging"}}], "give the share of neurons that"),
    ([{"quantize": {"bits": 4, "grid": "ternary"}}], "a ternary grid is stored in 2 bits a weight, got bits=4"),
    ([{"quantize": {"average_bits": 3, "grid": "ternary"}}], "a ternary grid has one width: leave out average_bits"),
    ([{"quantize": {"method": "gptq", "grid": "kmeans"}}], "grid must be 'uniform' or, with method='rtn'"),
    ([{"quantize": {"bias_correction": True}}], "bias_correction moves the levels of a codebook"),
    ([{"quantize": {"weighted": True}}], "weighted is of grid=kmeans, got uniform"),
]  # fmt: skip


@pytest.mark.parametrize("stages, message", MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_mistakes_are_named_before_anything_runs(stages, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(stages)


def test_no_option_hides_behind_what_recipes_call_otherwise():
    """`method` names a stage's method, so the score by which weights go has another name; no two options share one."""
    for kind, methods in KINDS.items():
        for load in methods.values():
            method = load()
            names = [name for options in method.options for name in option_fields(options)]
            assert "method" not in names and len(names) == len(set(names)), (kind, method.name)
    stages = [{"prune": {"method": "weights", "score": "movement"}}, {"prune": {"method": "blocks", "score": "norm"}}]
    assert [stage.own.callback().score.__class__.__name__ for stage in Recipe(stages).stages] == [
        "Movement",
        "Magnitude",
    ]


@pytest.mark.parametrize("options", [
    {"bits": 2, "grid": "kmeans", "weighted": True, "calibration_examples": 8}, {"bits": 1, "grid": "binary"},
    {"bits": 2, "grid": "ternary", "bias_correction": True}, {"bits": 3, "grid": "power_of_two"},
], ids=lambda o: o["grid"])  # fmt: skip
def test_levels_of_their_own_are_those_of_quantize(work, options):
    stage = {"quantize": {**options, "group_size": -1}}
    found = Recipe([stage], model=work["model"], data=work["data"]).run(work["folder"] / options["grid"])
    made = AutoModelForSequenceClassification.from_pretrained(found.model)
    assert any(isinstance(module, CodebookLinear) for module in made.modules())
    if "weighted" not in options:
        model = AutoModelForSequenceClassification.from_pretrained(work["model"])
        given = {name: options[name] for name in ("grid", "bias_correction") if name in options}
        hfc.quantize(model, options["bits"], group_size=-1, **given)
        expected, found = model.state_dict(), made.state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("score", ["entropy", "output_norm", "merging"])
def test_a_share_of_the_neurons_goes_by_the_score_that_was_named(work, score):
    stage = {"prune": {"method": "structure", "neurons": 0.5, "neuron_score": score, "scoring_examples": 8}}
    recipe = Recipe([stage], model=work["model"], data=work["data"])
    assert recipe.stages[0].reads == (score == "entropy")
    found = load_file(recipe.run(work["folder"] / score).model / "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(work["model"])
    widths = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    if score == "merging":
        hfc.merge_neurons(model, {i: width // 2 for i, width in enumerate(widths)})
    elif score == "output_norm":
        scores = hfc.neuron_importance(model, method=score)
        hfc.prune_neurons(
            model, {i: row.argsort(stable=True)[: len(row) // 2].tolist() for i, row in enumerate(scores)}
        )
    for name, weight in model.state_dict().items():
        assert found[name].shape == weight.shape or score == "entropy" and "dense" in name
        assert score == "entropy" or torch.equal(found[name], weight), name


def test_heads_go_by_confidence(work):
    stage = {"prune": {"method": "structure", "heads": 0.5, "head_score": "confidence"}}
    found = Recipe([stage], model=work["model"], data=work["data"]).run(work["folder"] / "confidence")
    model = AutoModelForSequenceClassification.from_pretrained(found.model)
    assert all(layer.attention.self.query.out_features == 16 for layer in model.bert.encoder.layer)


def test_labels_of_another_task_are_refused(work, tmp_path):
    recipe = Recipe([{"distil": TRAIN}], model=tiny_folder(tmp_path / "three", num_labels=3), data=work["data"])
    with pytest.raises(RecipeError, match="predicts the labels .'LABEL_0', 'LABEL_1', 'LABEL_2'., but .* Begin with"):
        recipe.run(tmp_path / "out")


def test_yaml_reads_numbers_and_pairs_as_they_are_meant(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "stages:\n- distil: {learning_rate: 1e-4, hints: 1:2, teacher: no, num_train_epochs: 3}\n", encoding="utf-8"
    )
    stage = Recipe.from_yaml(file).stages[0]
    assert (stage.own.learning_rate, stage.own.hints, stage.own.num_train_epochs) == (1e-4, "1:2", 3.0)
    file.write_text("stages: [\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="mine.yaml, line 2 is not valid YAML"):
        Recipe.from_yaml(file)
    file.write_text("stage: []\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="the key 'stage' is not known. Did you mean 'stages'"):
        Recipe.from_yaml(file)
