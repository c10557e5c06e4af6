"""What a user can get wrong in data and recipes ends in one sentence and code 2, before anything is made."""

import pytest
import yaml
from recipe_run import reviews, tiny_folder

from hf_compress.commands.main import main


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
    ([{"quantize": {}}, {"fine-tune": {}}], "Quantize last, or put both under `together:`"),
    ([{"quantize": {}}, {"distil": {}}], "afterwards only scales train, by `distil: {method: scales}`"),
    ([{"together": [{"distil": {"method": "scales"}}, {"prune": {"method": "heads"}}]}], "scales train after"),
    ([{"distil": {"method": "scales", "num_hidden_layers": 2}}], "leave out student and its sizes"),
    ([{"quantize": {}}, {"prune": {"heads": 0.5}}], "changes or trains weights, but stage 1 packs them"),
], ids=["option", "kind", "training after packing", "distilling after packing", "scales together",
        "scales of a new student", "pruning after packing"])  # fmt: skip
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
