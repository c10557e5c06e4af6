"""Labels keep their order, their names and the numbers that a model gives them; rows that are left out are counted."""

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from recipe_run import tiny_folder
from transformers import BertConfig

from hf_compress.recipe.data import DataOptions
from hf_compress.recipe.labels import numbers_in
from hf_compress.recipe.tasks.table import TASKS, task_of
from hf_compress.recipe.texts import label_names, load_texts, open_texts


def table(file, labels, times=6):
    rows = [f"text {n} {i},{label}" for n in range(times) for i, label in enumerate(labels)]
    file.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return str(file)


def labels_by_text(texts) -> dict[str, str]:
    names = texts.names
    return {row["text"]: names[row["label"]] for split in texts.labelled().values() for row in split}


def config(*names, head=True) -> BertConfig:
    architectures = ["BertForSequenceClassification"] if head else ["BertModel"]
    return BertConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
                      architectures=architectures)  # fmt: skip


@pytest.mark.parametrize("labels", [range(12), range(-3, 9), range(100, 112), ["3", "20", "100"]],
                         ids=["0 to 11", "negative", "from 100", "gaps"])  # fmt: skip
def test_whole_numbers_keep_their_order(labels, tmp_path):
    texts = open_texts(table(tmp_path / "numbers.csv", labels))
    assert texts.names == [str(label) for label in labels] and texts.shared_order
    for text, name in labels_by_text(texts).items():
        assert name == str(list(labels)[int(text.split()[-1])])


def test_numbers_that_an_empty_field_made_fractions_stay_whole(tmp_path):
    texts = open_texts(table(tmp_path / "fractions.csv", ["0.0", "1.0", "10.0", "2.0", ""]))
    assert texts.names == ["0", "1", "2", "10"]
    data = Dataset.from_dict(
        {"text": [f"t {i}" for i in range(40)], "label": [float(i % 3) for i in range(39)] + [None]}
    )
    data.to_parquet(tmp_path / "all.parquet")
    assert open_texts(str(tmp_path / "all.parquet")).names == ["0", "1", "2"]


def test_fractions_are_no_classes(tmp_path):
    with pytest.raises(ValueError, match=r"fractions, such as \['0.5', '1', '3.25'\]: numbers to predict, not classes"):
        open_texts(table(tmp_path / "scores.csv", ["0.5", "1", "3.25"]))


def test_numbers_with_a_decimal_comma_are_no_classes_and_no_words(tmp_path):
    """Of a score a masked language model would be made, and of a label as many classes as there are numbers."""
    base = tiny_folder(tmp_path / "base", task="mlm")
    for column in ("score", "label"):
        rows = [f"film {i};{i % 5},5" for i in range(40)]
        file = tmp_path / f"{column}.csv"
        file.write_text("\n".join([f"text;{column}", *rows]), encoding="utf-8")
        assert task_of(base, DataOptions(str(file))) == "regression"
        with pytest.raises(ValueError, match="must hold numbers, and holds '0,5': write it with a point"):
            TASKS["regression"]().open(DataOptions(str(file)), "used")
    with pytest.raises(ValueError, match=r"numbers with a decimal comma, such as \['0,5'.*Write .* with a point"):
        open_texts(str(file))


@pytest.mark.parametrize("word", ["None", "NA", "n/a", "N/A", "null", "NULL", "nan", "NaN", "<NA>", "#N/A", "-nan"])
def test_words_that_pandas_takes_for_nothing_are_words(word, tmp_path):
    texts = open_texts(table(tmp_path / "words.csv", ["other", word]))
    assert set(texts.names) == {"other", word}
    rows = [f"{word if i % 4 else 'more'},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    splits = load_texts(str(tmp_path / "texts.csv"))
    assert sum(text == word for split in splits.values() for text in split["text"]) == 30


def test_white_space_around_labels_goes(tmp_path):
    labels = ["Games", " Games", "Games\u00a0", "News", "\tNews "]
    assert open_texts(table(tmp_path / "spaces.csv", labels)).names == ["Games", "News"]


@pytest.mark.parametrize("labels", [["Games"], ["Games", " Games"], ["1", "1.0"], ["Games", ""]])
def test_one_class_is_refused(labels, tmp_path):
    with pytest.raises(ValueError, match=r"All \d+ labels of .* are '(Games|1)', but two classes or more are needed"):
        open_texts(table(tmp_path / "one.csv", labels))


def test_rows_without_a_label_stay_for_distillation_and_are_counted(tmp_path):
    texts = open_texts(table(tmp_path / "some.csv", [0, 1, "", 10]))
    assert texts.names == ["0", "1", "10"]
    assert texts.splits["train"]["label"].count(None) == 6
    (told,) = (note for note in texts.notes if "have no label" in note)
    assert told.startswith(
        "train: 6 of 24 rows have no label: distillation learns from them, fine-tuning and evaluation"
    )
    assert None not in texts.splits["test"]["label"] and None not in texts.splits["validation"]["label"]
    assert sum(map(len, texts.labelled().values())) == 18


def test_rows_without_text_are_counted(tmp_path):
    rows = [f"{'' if i < 3 else '   ' if i < 5 else 'word'},{'ab'[i % 2]}" for i in range(30)]
    (tmp_path / "gaps.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    assert "train: left out 5 of 30 rows, without text" in open_texts(str(tmp_path / "gaps.csv")).notes


def test_the_hub_marks_rows_without_label_by_minus_one(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    part = lambda labels: Dataset.from_dict(  # noqa: E731
        {"text": [f"t {i}" for i in range(len(labels))], "label": labels}, features=features
    )
    DatasetDict(train=part([1, 0] * 10), test=part([-1] * 5)).save_to_disk(tmp_path / "glue")
    texts = open_texts(str(tmp_path / "glue"))
    assert texts.names == ["no", "yes"] and texts.shared_order
    assert texts.splits["test"]["label"] == [None] * 5
    assert len(texts.labelled()["test"]) == 0


@pytest.mark.parametrize("labels, told", [
    (["a"] * 20 + ["b"] * 20 + ["rare"], r"too few of 'rare' \(1\)\. 3 of each class are needed"),
    (["a"] * 20 + ["b"] * 2 + ["rare"], r"too few of 'b' \(2\), 'rare' \(1\)\. 3 of each class are needed"),
])  # fmt: skip
def test_a_class_too_small_for_the_splits_is_named(labels, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        open_texts(table(tmp_path / "rare.csv", labels, times=1))


def test_a_class_of_three_is_in_all_splits(tmp_path):
    for split in open_texts(table(tmp_path / "three.csv", range(12), times=3)).splits.values():
        assert sorted(split["label"]) == list(range(12))


@pytest.mark.parametrize("names, shared, model, numbers", [
    (["0", "1", "10"], True, config(*(f"LABEL_{i}" for i in range(12))), [0, 1, 10]),
    (["0", "1"], True, config("NEGATIVE", "POSITIVE"), [0, 1]),
    (["neg", "pos"], False, config("pos", "neg", "other"), [1, 0]),
    (["1", "2", "3"], True, config("3", "2", "1"), [2, 1, 0]),
    (["neg", "pos"], True, config("LABEL_0", "LABEL_1"), [0, 1]),
    (["neg", "pos"], False, config("LABEL_0", "LABEL_1"), None),  # the alphabet says nothing of the model
    (["1", "2"], True, config("LABEL_0", "LABEL_1"), None),
    (["0", "1", "2"], True, config("1", "2", "3"), None),
    (["1", "2"], True, config("bad", "middling", "good"), None),
    (["spam", "ham"], False, config("pos", "neg"), None),
], ids=str)  # fmt: skip
def test_the_model_numbers_the_labels(names, shared, model, numbers):
    assert numbers_in(model, names, shared_order=shared) == numbers


def test_names_in_the_order_of_the_model_can_be_given(tmp_path):
    source = table(tmp_path / "named.csv", ["neg", "pos"])
    texts = open_texts(source, label_names=["pos", "neg"])
    assert texts.names == ["pos", "neg"] and texts.shared_order
    assert set(labels_by_text(texts).values()) == {"neg", "pos"}
    with pytest.raises(ValueError, match=r"label_names are \['pos', 'other'\], but the train .* has also \['neg'\]"):
        open_texts(source, label_names=["pos", "other"])


def test_truth_values_are_false_then_true(tmp_path):
    texts = open_texts(table(tmp_path / "truth.csv", ["True", "False"]))
    assert texts.names == ["False", "True"] and texts.shared_order
    data = Dataset.from_dict({"text": [f"t {i}" for i in range(30)], "label": [i % 3 > 0 for i in range(30)]})
    data.to_parquet(tmp_path / "truth.parquet")
    assert label_names(open_texts(str(tmp_path / "truth.parquet")).splits) == ["False", "True"]


@pytest.mark.parametrize("first, second", [("premise", "hypothesis"), ("question", "sentence"), ("text_a", "text_b"),
    ("Sentence1", "Sentence2")])  # fmt: skip
def test_pairs_of_texts(first, second, tmp_path):
    rows = [f"one {i},two {i},{'ab'[i % 2]}" for i in range(30)]
    (tmp_path / "pairs.csv").write_text("\n".join([f"{first},{second},label", *rows, "alone,,a"]), encoding="utf-8")
    texts = open_texts(str(tmp_path / "pairs.csv"))
    for split in texts.splits.values():
        assert split.column_names == ["text", "text_pair", "label"]
        assert all(row["text_pair"] == row["text"].replace("one", "two") for row in split)
    assert f"train: left out 1 of 31 rows, without {first} or without {second}" in texts.notes
    named = open_texts(str(tmp_path / "pairs.csv"), text_column=f"{second},{first}")
    assert named.splits["train"]["text"][0].startswith("two")


def json_lines(file, texts, labels) -> str:
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(file)


def test_numbers_and_texts_of_numbers_in_one_column_are_the_same_labels(tmp_path):
    source = json_lines(tmp_path / "mixed.jsonl", [f"text {i}" for i in range(40)], [*[0, 1] * 10, *["0", "1"] * 10])
    assert open_texts(source).names == ["0", "1"]
    with pytest.raises(ValueError, match="must hold one value a row in the column 'label', but row 40 has \\['0'\\]"):
        open_texts(json_lines(tmp_path / "list.jsonl", [f"text {i}" for i in range(40)], [*[0, 1] * 19, 1, ["0"]]))


def test_lists_that_a_table_keeps_as_texts_are_no_classes(tmp_path):
    source = json_lines(tmp_path / "texts.jsonl", [f"text {i}" for i in range(40)], ["['a', 'b']", "['b']"] * 20)
    with pytest.raises(ValueError, match="are lists written as texts, such as"):
        open_texts(source)


def test_rows_without_any_text_are_not_said_to_lack_labels(tmp_path):
    source = json_lines(tmp_path / "empty.jsonl", [" "] * 40, ["a", "b"] * 20)
    with pytest.raises(ValueError, match="No row of the train split of .* has a text in 'text'"):
        open_texts(source, labels="needed")
