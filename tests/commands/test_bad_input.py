"""What a user can get wrong in data and recipes ends in one sentence and code 2, before anything is made."""

import re

import pytest
import yaml
from recipe_run import reviews, tiny_folder

from hf_compress.commands.main import main
from hf_compress.recipe.options import read_yaml


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model and texts that it can learn."""
    folder = tiny_folder(tmp_path_factory.mktemp("bad") / "model").parent
    return reviews(folder / "reviews.csv").parent


def run(work, stages, data, *more):
    (work / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    command = ["run", str(work / "recipe.yaml"), "--model", str(work / "model"), "--data", str(data)]
    return main([*command, "--output", str(work / "out"), *more])


def labels(file, *names):
    file.write_text(
        "\n".join(["text,label", *(f"the film was good {i},{name}" for i, name in enumerate(names))]) + "\n",
        encoding="utf-8",
    )


def test_a_label_that_training_never_saw(work, tmp_path, capsys):
    labels(tmp_path / "train.csv", *["good", "bad"] * 20)
    labels(tmp_path / "test.csv", "good", "awful")
    assert run(work, [{"fine-tune": {}}], tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("has labels ['awful'] that its train split has not.")


@pytest.mark.parametrize("stages, message", [
    ([{"fine-tune": {"learning_rat": 1e-4}}], "the option 'learning_rat' is not known. Did you mean 'learning_rate'?"),
    ([{"quantise": {}}], "the kind 'quantise' is not known. Did you mean 'quantize'?"),
    ([{"prune": {"method": "weights", "score": "movment"}}], "score must be one of magnitude, movement, wanda, got"),
    ([{"quantize": {}}, {"fine-tune": {}}], "Quantize last, or put both under `together:`"),
    ([{"quantize": {}}, {"distil": {}}], "afterwards only scales train, by `distil: {method: scales}`"),
    ([{"together": [{"distil": {"method": "scales"}}, {"prune": {"method": "heads"}}]}], "scales train after"),
    ([{"distil": {"method": "scales", "num_hidden_layers": 2}}], "leave out student and its sizes"),
    ([{"quantize": {}}, {"prune": {"heads": 0.5}}], "changes or trains weights, but stage 1 packs them"),
], ids=["option", "kind", "a score by its own name", "training after packing", "distilling after packing",
        "scales together", "scales of a new student", "pruning after packing"])  # fmt: skip
def test_recipes_with_typos_and_stages_that_do_not_fit(stages, message, work, capsys):
    assert run(work, stages, work / "reviews.csv", "--output", str(work / "nothing")) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (work / "nothing").exists(), "nothing has run"


@pytest.mark.parametrize("name, content, message", [
    ("stars.csv", "text,stars\nfine,1\n", "needs a column named one of"),
    ("empty.csv", "text,label\n", "empty.csv cannot be read as csv, with at least one example"),
    ("few.csv", "text,label\nfine,1\npoor,0\n", "2 examples are too few to hold out 10%"),
    ("torn.csv", "text,label\nfine,1\na,b,c,d\n", "torn.csv cannot be read as csv"),
    ("notes.pdf", "%PDF", "must be a CSV, TSV, JSON or text file, got .pdf."),
])  # fmt: skip
def test_files_without_what_is_needed(name, content, message, work, tmp_path, capsys):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert run(work, [{"fine-tune": {}}], tmp_path / name) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_data_that_is_not_there(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(work, [{"fine-tune": {}}], tmp_path / "nothing.csv") == 2
    assert "nothing.csv" in capsys.readouterr().err.splitlines()[-1]


def test_validation_texts_without_labels_cost_a_figure_and_no_training(work, tmp_path, capsys):
    labels(tmp_path / "train.csv", *["good", "bad"] * 20)
    (tmp_path / "validation.csv").write_text("text\na film\nanother\n", encoding="utf-8")
    model = tiny_folder(tmp_path / "mlm", task="mlm")
    training = {"max_steps": 1, "use_cpu": True}
    stages = [{"fine-tune": {**training, "eval_strategy": "steps", "eval_steps": 1}}]
    options = ("--model", str(model), "--output", str(tmp_path / "out"))
    assert run(work, stages, tmp_path, *options) == 2
    assert "The validation split of" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert run(work, [{"fine-tune": training}], tmp_path, *options) == 0
    assert "on 0 validation texts" not in capsys.readouterr().err


ONE = {"max_steps": 1, "use_cpu": True}
LATE = [  # stages, of which the last ones would fail when the first is done -> the sentence
    ([{"fine-tune": ONE}, {"evaluate": {"models": "nothere"}}], "among the models before it, 'nothere' is not known"),
    (
        [{"fine-tune": ONE}, {"evaluate": {"models": "rtn"}}, {"quantize": {}}],
        "'rtn' is not known. Known are fine-tune",
    ),
    ([{"distil": {**ONE, "teacher": "fine-tune"}}, {"fine-tune": ONE}], "takes the model of fine-tune, which no stage"),
    ([{"distil": {**ONE, "name": "me", "teacher": "me"}}], "takes the model of me, which no stage before it makes"),
    ([{"fine-tune": ONE}, {"distil": {**ONE, "teacher": "no/where/at/all"}}], "There is no model no/where/at/all"),
    ([{"fine-tune": ONE}, {"publish": {"repo_id": "a b"}}], "repo_id must be a name on the Hub, such as 'user/name'"),
    ([{"fine-tune": ONE}, {"publish": {"repo_id": "a/b/c"}}], "repo_id must be a name on the Hub, such as 'user/name'"),
    ([{"fine-tune": ONE}, {"export": {"format": "gptq"}}], "export: gptq is of packed models: quantize before it"),
    ([{"export": {"format": "compressed-tensors"}}, {"quantize": {}}], "is of packed models: quantize before it"),
    ([{"fine-tune": ONE}, {"evaluate": {"sequence_length": 1000}}], "but .* reads 64 tokens at most"),
    ([{"fine-tune": ONE}, {"evaluate": {"sequence_length": 0}}], "sequence_length must be at least 1, got 0"),
    ([{"fine-tune": ONE}, {"evaluate": {"metric": "rouge"}}], "metric: rouge is of texts that are written"),
    ([{"fine-tune": {**ONE, "seed": -1}}], "seed must lie between 0 and 4294967295, got -1"),
    ([{"fine-tune": {**ONE, "learning_rate": "nan"}}], "learning_rate must be at least 0, and a number, got nan"),
    ([{"fine-tune": {**ONE, "learning_rate": "inf"}}], "learning_rate must be at least 0, and a number, got inf"),
    ([{"fine-tune": {**ONE, "per_device_train_batch_size": 0}}], "per_device_train_batch_size must be at least 1"),
    ([{"fine-tune": {**ONE, "gradient_accumulation_steps": 0}}], "gradient_accumulation_steps must be at least 1"),
    ([{"fine-tune": {**ONE, "max_steps": 0}}], "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
    ([{"fine-tune": {"num_train_epochs": 0}}], "num_train_epochs must be above 0, and a number, got 0"),
    ([{"fine-tune": {**ONE, "report_to": "nowhere"}}], "report_to: nowhere is not installed here"),
    ([{"distil": {**ONE, "hidden_size": 0}}], "hidden_size must be at least 1, got 0"),
    ([{"distil": {**ONE, "num_hidden_layers": -1}}], "num_hidden_layers must be at least 1, got -1"),
    ([{"distil": {**ONE, "layers": "0,,1"}}], "layers must be first, last, skip or numbers such as 0,2,5"),
    ([{"distil": {**ONE, "weights": "fersh"}}], "weights must be copy or fresh, got 'fersh'"),
    ([{"fine-tune": {**ONE, "name": "input"}}], "'input' is the model that a recipe begins with"),
    ([{"fine-tune": {**ONE, "name": "a" * 300}}], "at most 64 characters"),
]


@pytest.mark.parametrize("stages, message", LATE, ids=lambda value: value[:24] if isinstance(value, str) else "")
def test_what_would_fail_after_a_training_is_told_before_it(stages, message, work, tmp_path, capsys):
    assert run(work, stages, work / "reviews.csv", "--output", str(tmp_path / "nothing")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, told), told
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("text, message", [
    ("stages:\n- quantize: {bits: 8, bits: 4}", "line 2 is not valid YAML: 'bits' is there twice"),
    ("stages:\n- quantize:\nstages:\n- evaluate:", "line 3 is not valid YAML: 'stages' is there twice"),
    ("data: [a]\nstages: [quantize]", "data must be a file, a folder, a name or a mapping, got"),
    ("data: 3\nstages: [quantize]", "data must be a file, a folder, a name or a mapping, got 3"),
    ("task: {a: b}\nstages: [quantize]", "The recipe: task must be a text or null"),
    ("model: {a: b}\nstages: [quantize]", "The recipe: model must be a text or null"),
    ("name: {a: b}\nstages: [quantize]", "The recipe: name must be a text"),
    ("seed: -1\nstages: [quantize]", "The recipe: seed must lie between 0 and 4294967295, got -1"),
])  # fmt: skip
def test_a_recipe_that_says_a_thing_twice_or_in_another_form(text, message, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert main(["run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "o")]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_what_a_merge_brings_may_be_said_again():
    text = "a: &a {bits: 8, name: x}\nb: {<<: *a, bits: 4}"
    assert read_yaml(text, "r.yaml")["b"] == {"bits": 4, "name": "x"}
