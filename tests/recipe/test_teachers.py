"""Who teaches whom in a recipe: students named by their stage, and teachers that run once."""

import pytest
import torch
from recipe_run import TRAIN, reviews, tiny_folder
from safetensors.torch import load_file

import hf_compress as hfc
from hf_compress.distillation import TERMS
from hf_compress.distillation.terms import Term
from hf_compress.recipe import Recipe, RecipeError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    file = reviews(folder / "r.csv")
    bare = "".join(f"the film was {letter} {letter},\n" for letter in "abcdefghij")  # no label
    file.write_text(file.read_text(encoding="utf-8") + bare, encoding="utf-8")
    return {"model": tiny_folder(folder / "model"), "data": {"source": str(file), "max_length": 16}, "folder": folder}


def run(work, name, *stages):
    result = Recipe(list(stages), model=work["model"], data=work["data"]).run(work["folder"] / name)
    return {one["name"]: (one, result.output / "stages" / one["folder"]) for one in result.stages}


def test_a_teacher_that_ran_once_teaches_the_same(work):
    """Texts with and without labels; the batches of the two differ in padding, and so in rounding."""
    distil = {**TRAIN, "num_hidden_layers": 2, "alpha": 1.0, "logging_steps": 1, "bf16": False}  # on any processor
    found = [run(work, f"cache-{cache}", {"distil": {**distil, "cache_teacher": cache}})["distil"]
             for cache in (False, True)]  # fmt: skip
    losses = [record["figures"]["last_losses"]["soft_loss"] for record, _ in found]
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert not any("teacher" in path.name for path in found[1][1].rglob("*")), "what was kept for the training goes"


@pytest.mark.parametrize("student, expected", [("first", "first"), (None, "second")])
def test_a_student_named_by_its_stage_starts_from_that_model(work, student, expected):
    still = {**TRAIN, "learning_rate": 0.0}  # what it starts from is what it ends with
    named = {} if student is None else {"student": student}
    stages = [{"fine-tune": {**TRAIN, "name": "first"}}, {"fine-tune": {**TRAIN, "name": "second"}}]
    made = run(work, f"named-{student}", *stages, {"distil": {**still, **named, "teacher": "first"}})
    weights = {name: load_file(folder / "model" / "model.safetensors") for name, (_, folder) in made.items()}
    assert all(torch.equal(weights["distil"][key], value) for key, value in weights[expected].items())
    assert any(not torch.equal(weights["first"][key], value) for key, value in weights["second"].items())


@pytest.mark.parametrize("options, what", [
    ({"hints": "1:2"}, "hints"), ({"method": "tinybert"}, "tinybert"), ({"method": "pkd"}, "pkd"),
])  # fmt: skip
def test_logits_alone_are_not_enough_for_what_reads_more(options, what):
    with pytest.raises(RecipeError, match=f"cache_teacher keeps the teacher's logits alone.*{what}"):
        Recipe([{"distil": {**options, "cache_teacher": True}}])


CUT = {"prune": {"method": "vocabulary"}}
THIN = {"prune": {"method": "structure", "neurons": 0.5}}


@pytest.mark.parametrize("stages, stage, teacher", [
    ([CUT, {"distil": {}}], "distil", "input"),  # whom it learns from where nothing is said
    ([CUT, THIN, {"distil": {"teacher": "input", "cache_teacher": True}}], "distil", "input"),
    ([{"fine-tune": {"name": "tuned"}}, THIN, CUT, {"distil": {}}], "distil", "tuned"),
    ([CUT, {"distil": {"teacher": "vocabulary", "student": "input"}}], "distil", "vocabulary"),
    ([CUT, {"together": [{"distil": {}}, {"prune": {"method": "weights"}}]}], "together", "input"),
])  # fmt: skip
def test_a_teacher_that_reads_other_tokens_is_refused(stages, stage, teacher):
    """The vocabulary was cut between them: its numbers are other words to the teacher, and nothing would fail."""
    said = f"({stage}|distil).* learns from {teacher}, which reads other tokens.*say `teacher: vocabulary`"
    with pytest.raises(RecipeError, match=said):
        Recipe(stages)


@pytest.mark.parametrize("stages", [
    [CUT, THIN, {"distil": {"teacher": "vocabulary"}}],
    [CUT, {"distil": {"num_hidden_layers": 2}}],  # of the model that enters
    [CUT, {"fine-tune": {}}, THIN, {"distil": {}}],
    [{"distil": {"name": "small", "num_hidden_layers": 2}}, CUT, {"distil": {"student": "small", "teacher": "input"}}],
])  # fmt: skip
def test_a_teacher_of_the_same_vocabulary_is_taken(stages):
    assert len(Recipe(stages).stages) == len(stages)


def test_losses_of_inner_layers_are_learned_besides(work):
    """Named with commas, or with settings; gradients of the input need attention that is not fused."""
    written = {"sobolev": {"sobolev_weight": 0.5}, "neighbour-order": None}
    distil = {**TRAIN, "num_hidden_layers": 2, "logging_steps": 1}
    named = run(work, "terms", {"distil": {**distil, "terms": "fsp, pkd"}}, {"distil": {**distil, "terms": written}})
    losses = [named[name][0]["figures"]["last_losses"] for name in ("distil", "distil-2")]
    assert losses[0]["fsp_loss"] > 0 and losses[0]["patient_loss"] > 0
    assert losses[1]["sobolev_loss"] > 0 and losses[1]["order_loss"] > 0


def test_every_term_has_a_name_in_recipes():
    """A class of hf_compress that is a term, but for hints, which all methods take, and what embedders learn."""
    named = {name for _, name in TERMS.values()}
    kinds = (getattr(hfc, name) for name in hfc.__all__)
    found = {kind.__name__ for kind in kinds if isinstance(kind, type) and issubclass(kind, Term)}
    assert found - named - {"Term"} <= {"Hints", "SentenceVectors"} and named <= found


@pytest.mark.parametrize("options, message", [
    ({"terms": "fps"}, "the term 'fps' is not known. Did you mean 'fsp'"),
    ({"terms": {"fsp": {"weight": 1}}}, "the term fsp: the option 'weight' is not known"),
    ({"terms": {"sobolev": {"sobolev_weight": 0}}}, "the term sobolev: sobolev_weight must be above 0"),
    ({"terms": {"fsp": 2}}, "the settings of the term fsp must be a mapping, got 2"),
    ({"terms": "pkd", "method": "pkd"}, "pkd is learned already"),
    ({"terms": "pkd", "method": "theseus"}, "theseus takes no terms"),
    ({"terms": "pkd", "cache_teacher": True}, "keeps the teacher's logits alone, and terms read inner layers"),
])  # fmt: skip
def test_terms_that_cannot_be_learned_are_named_before_anything_runs(options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe([{"distil": options}])
