"""What a recipe leaves: a report only of the model that lies beside it, and nothing of anybody else replaced."""

import json

import pytest
from recipe_run import QUICK, TRAIN, reviews, tiny_folder

from hf_compress.commands.compare import made_by
from hf_compress.commands.publish import report_in
from hf_compress.commands.run import changed_stages, show
from hf_compress.recipe import Recipe, RecipeError
from hf_compress.recipe import publish as publishing
from hf_compress.recipe.fingerprints import code_fingerprint
from hf_compress.recipe.options import MOST_VALUES, read_yaml
from hf_compress.recipe.recipe import REPORT_FILES
from hf_compress.recipe.stage import Made, Past
from hf_compress.recipe.training import Change

EVALUATE = {"evaluate": {"models": "input", "batch_size": 8, **QUICK, "latency_rounds": 1, "throughput_rounds": 1}}
EIGHT, FOUR = ({"quantize": {"bits": bits}} for bits in (8, 4))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    data = {"source": str(reviews(folder / "r.csv", 20)), "max_length": 16}
    return {"model": tiny_folder(folder / "model"), "data": data}


@pytest.fixture(scope="module")
def evaluated(work, tmp_path_factory):
    """Evaluated, then packed in 8 bits, and that evaluated: kept stages for all tests here."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    Recipe([EVALUATE, EIGHT, EVALUATE], **work).run(output)
    return output


def report_of(output):
    return json.loads((output / "report.json").read_text(encoding="utf-8"))["entries"][-1]


def test_a_report_goes_when_another_model_comes_and_comes_back_with_its_own(work, evaluated, capsys, caplog):
    eight = report_of(evaluated)
    result = Recipe([EVALUATE, FOUR], **work).run(evaluated)
    assert result.report is None and "No evaluation is of the model that the run ends with" in caplog.text
    assert not any((evaluated / name).exists() for name in REPORT_FILES)
    assert [r["kind"] for r in json.loads((evaluated / "stages.json").read_text(encoding="utf-8"))][-1] == "quantize"
    show(result)
    assert "accuracy" not in capsys.readouterr().out
    result = Recipe([EVALUATE, EIGHT, EVALUATE], **work).run(evaluated)
    assert result.report == evaluated and report_of(evaluated) == eight
    show(result)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("stages, has_report", [([EVALUATE, EIGHT], False), ([EVALUATE, EIGHT, EVALUATE], True)])
def test_only_a_report_of_the_published_model_is_published(stages, has_report, work, evaluated, monkeypatch):
    given = {}

    def publish(folder, repo_id, **options):
        given.update(options, folder=folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        Recipe([*stages, {"publish": {"repo_id": "me/small"}}], **work).run(evaluated)
    assert (given["report"] is not None) == has_report
    if has_report:
        assert given["report"].name.startswith("03-evaluate-2")


def test_a_report_beside_another_model_is_passed_over(work, evaluated, tmp_path, caplog):
    assert report_in(evaluated, str(evaluated / "model")) == evaluated / "report.json"
    assert report_in(evaluated, str(work["model"])) is not None, "the reference is in it as well"
    other = tiny_folder(tmp_path / "other", num_labels=3)
    assert report_in(evaluated, str(other)) is None and "is of another model" in caplog.text
    assert report_in(tmp_path, str(other)) is None


def test_what_was_trained_in_a_joint_run_is_what_others_are_held_against(tmp_path):
    for kind, expected in (("fine-tune", "together"), ("distil", "input")):
        (stage,) = Recipe([{"together": [{kind: TRAIN}, {"quantize": {"method": "qat"}}]}]).stages
        (tmp_path / "model").mkdir(exist_ok=True)
        past = Past([Made("input", "a", "0")])
        past.add(stage, tmp_path, {"fingerprint": "1"})
        assert past.last.name == "together" and past.reference.name == expected


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_current_folder_of_a_project_is_refused(work, tmp_path, monkeypatch):
    for name in ("model/weights.bin", "recipe.yaml", "app.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds app.py, model, recipe.yaml, which hf_compress did not write"):
        Recipe([FOUR], **work).run(".")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["model/notes.txt", "recipe.yaml", "report.md"])
def test_what_somebody_changed_in_an_output_stops_a_run_before_it_works(name, work, evaluated, monkeypatch):
    old = (evaluated / name).read_bytes() if (evaluated / name).exists() else None
    (evaluated / name).write_bytes(b"mine")
    monkeypatch.setattr(Change, "run", lambda *a: pytest.fail("it had begun"))
    with pytest.raises(ValueError, match=f"{name} in .* would be replaced"):
        Recipe([{"quantize": {"bits": 2, "group_size": 16}}], **work).run(evaluated)
    assert (evaluated / name).read_bytes() == b"mine"
    (evaluated / name).unlink() if old is None else (evaluated / name).write_bytes(old)


def test_other_code_makes_other_results(work, evaluated, monkeypatch):
    code_fingerprint.cache_clear()
    before = code_fingerprint()
    monkeypatch.setattr("hf_compress.recipe.fingerprints.file_digest", lambda file: "other")
    code_fingerprint.cache_clear()
    assert code_fingerprint() != before
    code_fingerprint.cache_clear()


STAGES = [
    "fine-tune", {"prune": {"method": "heads"}}, {"prune": {"method": "vocabulary"}}, "evaluate",
    {"together": [{"distil": {}}, {"quantize": {"method": "qat"}}]}, {"quantize": None},
    {"evaluate": {"split": "test"}},
]  # fmt: skip


@pytest.mark.parametrize("target, place", [
    ("evaluate-2", lambda s: s[6]["evaluate"]), ("evaluate", lambda s: s[3]["evaluate"]),
    ("rtn", lambda s: s[5]["quantize"]), ("distill", lambda s: s[4]["together"][0]["distil"]),
    ("vocabulary", lambda s: s[2]["prune"]), ("distil", lambda s: s[4]["together"][0]["distil"]),
    ("together.qat", lambda s: s[4]["together"][1]["quantize"]), ("prune", None), ("quantize", None),
    ("tune", None),
])  # fmt: skip
def test_set_knows_the_names_that_log_and_report_show(target, place):
    if place is None:
        message = {"prune": "2 stages are called 'prune': say which, heads, vocabulary", "tune": "no stage 'tune'",
                   "quantize": "2 stages are called 'quantize': say which, together.qat, rtn"}[target]  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            changed_stages(STAGES, [f"{target}.seed=7"])
    else:
        before = json.dumps(STAGES)
        assert place(changed_stages(STAGES, [f"{target}.seed=7"]))["seed"] == 7
        assert json.dumps(STAGES) == before


def test_a_recipe_stands_for_what_it_makes_also_without_a_command_line(work, tmp_path):
    (tmp_path / "mine.yaml").write_text(Recipe([FOUR], **work).to_yaml(), encoding="utf-8")
    assert made_by(str(tmp_path / "mine.yaml"), {}, tmp_path) == str(tmp_path / "recipes" / "mine" / "model")


NINE = "[" + ",".join(["*{0}"] * 9) + "]"
BOMBS = {
    "aliases": "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} {NINE.format(f'a{i - 1}')}" for i in range(1, 12)),
    "merges": "a0: &a0 {x: 1}\n" + "\n".join(
        f"a{i}: &a{i} {{<<: {NINE.format(f'a{i - 1}')}}}" for i in range(1, 12)
    ),
    "itself": "a: &a [*a]",
    "deep": "[" * 5000,
    "long": "# x\n" * 300_000,
    "many": "a: [" + "1," * (MOST_VALUES + 1) + "]",
}  # fmt: skip


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_few_lines_cannot_stand_for_billions(text):
    with pytest.raises(RecipeError, match="too large|too deeply|at most|more than"):
        read_yaml(text, "mine.yaml")


def test_aliases_may_be_used_for_what_they_are_good_for():
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "x")["b"] == {"x": 1, "y": 2}
