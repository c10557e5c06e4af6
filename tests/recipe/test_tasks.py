"""Every task walks from a file and a command to a small model, reloaded, and its metric."""

import json
import re

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from recipe.task_files import (
    CASES,
    asked,
    chosen,
    classified,
    model_of,
    plain,
    scored,
    several,
    source_of,
    tagged,
    write,
)
from recipe_run import QUICK, TRAIN, tiny_folder
from transformers import AutoTokenizer

from hf_compress.commands.main import main
from hf_compress.recipe.data import DataOptions, RecipeData
from hf_compress.recipe.tasks.embedding import Embeddings
from hf_compress.recipe.tasks.table import TASKS, task_of

LAST = [{"distil": {**TRAIN, "max_steps": 1, "num_hidden_layers": 2}},
        {"prune": {"method": "structure", "heads": 0.5, "scoring_examples": 8}},
        {"quantize": {"method": "gptq", "bits": 8, "calibration_examples": 24}},
        {"evaluate": {**QUICK, "models": "fine-tune"}}]  # fmt: skip


def test_every_task_walks():
    assert {case.task for case in CASES} == set(TASKS) - {Embeddings.name}  # which has no labels: test_embedders.py


FIRST = {case.task: case for case in reversed(CASES)}
WALKS = [pytest.param(case, marks=[] if case is FIRST[case.task] else pytest.mark.long,
                      id=f"{case.task}-{case.row.__name__}") for case in CASES]  # fmt: skip


@pytest.mark.parametrize("case", WALKS)
def test_from_a_command_to_a_reloaded_model_and_its_metric(case, tmp_path, capsys):
    source, model = source_of(case, tmp_path / "data"), model_of(case, tmp_path / "begin")
    stages = [{"fine-tune": {**TRAIN, "max_steps": 3}}, *LAST]
    if case.family == "t5":  # its heads are not cut one by one
        stages = [stage for stage in stages if "prune" not in stage]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    command = ["run", str(tmp_path / "mine.yaml"), "--model", str(model), "--data", str(source), "--max-length", "16",
               "--output", str(tmp_path / "out"), *case.options]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["metric"] == case.metric
    quality = report["entries"][-1]["seed_qualities"][0]
    loaded = case.auto_class.from_pretrained(tmp_path / "out" / "model").eval()
    expected = case.expected(loaded, AutoTokenizer.from_pretrained(tmp_path / "out" / "model"),
                             [case.row(i) for i in range(30, 40)])  # fmt: skip
    # padded batches against single rows: sums of float32 in another order
    assert expected is None or quality == pytest.approx(expected, abs=1e-4)
    compared = [
        "compare",
        f"small={tmp_path / 'out'}",
        "--data",
        str(source),
        "--max-length",
        "16",
        "--output",
        str(tmp_path / "report"),
        *case.options,
        *[w for n, v in QUICK.items() for w in (f"--{n}", str(v))],
    ]
    assert main(compared) == 0, capsys.readouterr().err
    again = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert again["metric"] == case.metric and again["entries"][0]["seed_qualities"][0] == pytest.approx(quality)


def table(folder, row, form="jsonl", number=24):
    file = folder / f"{row.__name__}.{form}"
    write(file, [row(i) for i in range(number)])
    return file


@pytest.mark.parametrize("row, task", [
    (classified, "sequence-classification"), (scored, "regression"), (tagged, "token-classification"),
    (asked, "question-answering"), (chosen, "multiple-choice"), (plain, "masked-lm"),
])  # fmt: skip
def test_a_model_to_begin_with_gets_the_task_of_the_data(row, task, tmp_path):
    options = DataOptions(str(table(tmp_path, row)), label_column="score" if row is scored else None)
    assert task_of(tiny_folder(tmp_path / "model", task="mlm"), options) == task


def test_a_model_with_a_head_keeps_its_task(tmp_path):
    options = DataOptions(str(table(tmp_path, classified)))
    kinds = {
        "regression": {"num_labels": 1},
        "multi-label-classification": {"problem_type": "multi_label_classification"},
    }
    for task, changes in kinds.items():
        assert task_of(tiny_folder(tmp_path / task, **changes), options) == task
    for task, name in (("tokens", "token-classification"), ("answers", "question-answering")):
        assert task_of(tiny_folder(tmp_path / task, task=task), options) == name
    for family, task in (("gpt2", "causal-lm"), ("llama", "causal-lm"), ("t5", "seq2seq-lm"), ("bart", "seq2seq-lm"),
                         ("xlm", "masked-lm")):  # fmt: skip
        folder = tiny_folder(tmp_path / family, family, **({"task": "mlm"} if family == "xlm" else {}))
        assert task_of(folder, DataOptions(str(table(tmp_path, plain)))) == task


WRONG = [  # task, what the file holds, the sentence
    ("token-classification", classified, r"the columns \['text', 'label'\], but token-classification needs lists of "
     r"words and of their tags \(tokens, tags\)"),
    ("question-answering", classified, r"the columns \['text', 'label'\], but question-answering needs a question, a"),
    ("multiple-choice", tagged, r"the columns \['tokens', 'tags'\], but multiple-choice needs a question, its choices"),
    ("seq2seq-lm", classified, r"the columns \['text', 'label'\], but seq2seq-lm needs a text and what is to be"),
    ("multi-label-classification", classified, r"The column 'label' must hold lists of labels, and holds 'neg'"),
    ("regression", classified, r"The column 'label' must hold numbers, and holds 'neg'"),
    ("masked-lm", tagged, r"needs a column named one of .* it has \['tokens', 'tags'\]"),
    ("sequence-classification", asked, r"needs a column named one of"),
]  # fmt: skip


@pytest.mark.parametrize("task, row, sentence", WRONG, ids=lambda value: getattr(value, "__name__", value)[:30])
def test_data_of_another_task_are_one_sentence_before_any_work(task, row, sentence, tmp_path, capsys):
    model, source = tiny_folder(tmp_path / "model", task="mlm"), table(tmp_path, row)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": [{"fine-tune": TRAIN}]}), encoding="utf-8")
    command = ["run", str(tmp_path / "mine.yaml"), "--model", str(model), "--data", str(source), "--task", task,
               "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hf-compress: ") and re.search(sentence, last), last
    assert not list((tmp_path / "out").glob("stages/*")) if (tmp_path / "out").exists() else True


def test_a_model_of_another_task_is_refused_by_name(tmp_path, capsys):
    model = tiny_folder(tmp_path / "model", task="answers")
    for task, row, what in (("token-classification", tagged, "has no head for tags"),
                            ("masked-lm", plain, "has no head for the words of a text"),
                            ("regression", scored, "has no head for labels, but .* has numbers")):  # fmt: skip
        command = ["quantize", "--model", str(model), "--data", str(table(tmp_path, row)), "--task", task, "--output",
                   str(tmp_path / "out"), *(["--label_column", "score"] if row is scored else [])]  # fmt: skip
        assert main(command) == 2
        assert re.search(what, capsys.readouterr().err)


def test_rows_that_lack_something_are_counted_and_said(tmp_path):
    rows = [asked(i) for i in range(20)]
    rows[3]["answers"], rows[4]["context"] = {"text": ["elsewhere"], "answer_start": [0]}, ""
    rows[5]["answers"] = {"text": [], "answer_start": []}  # a question without an answer is one
    write(tmp_path / "some.jsonl", rows)
    data = RecipeData(DataOptions(str(tmp_path / "some.jsonl"), max_length=16), "question-answering")
    assert sum(map(len, data.texts.values())) == 18
    assert any("train: left out 2 of 20 rows, without a question, a context and answers" in note for note in data.notes)


def test_masks_are_the_same_each_time_and_cover_no_special_token(tmp_path):
    folder = tiny_folder(tmp_path / "model", task="mlm")
    data = RecipeData(DataOptions(str(table(tmp_path, plain, number=200)), max_length=16), "masked-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = (data.tokenized(tokenizer, measured=True)["train"] for _ in range(2))
    assert first["input_ids"] == second["input_ids"] and first["labels"] == second["labels"]
    plain_rows = data.tokenized(tokenizer)["train"]
    assert "labels" not in plain_rows.column_names
    chosen_tokens = total = 0
    for row, before in zip(first, plain_rows, strict=True):
        for token, label, was in zip(row["input_ids"], row["labels"], before["input_ids"], strict=True):
            assert label in (-100, was) and (label != -100 or token == was)
            assert label == -100 or was not in tokenizer.all_special_ids
            chosen_tokens += label != -100
            total += was not in tokenizer.all_special_ids
    # 700 draws of 0.15 deviate by 0.0135: five of them
    assert abs(chosen_tokens / total - 0.15) < 0.07
    torch.manual_seed(0)
    batches = [data.collator(tokenizer)([plain_rows[i] for i in range(8)]) for _ in range(2)]
    assert not torch.equal(batches[0]["labels"], batches[1]["labels"])


def test_words_of_several_tokens_count_once_whatever_the_tokenizer(tmp_path):
    """`wordy` is not in the vocabulary: as pieces, its first one alone has the tag."""
    folder = tiny_folder(tmp_path / "model", task="mlm")
    rows = [{"tokens": ["the", "good film", "", "bad"], "tags": [0, 1, 1, 0]} for _ in range(20)]
    write(tmp_path / "some.jsonl", rows)
    data = RecipeData(DataOptions(str(tmp_path / "some.jsonl"), label_names=["B-X", "O"]), "token-classification")
    row = data.tokenized(AutoTokenizer.from_pretrained(folder))["train"][0]
    assert data.labels == ["B-X", "O"] and row["labels"] == [-100, 0, 1, -100, 0, -100]


def test_named_columns_and_classes_of_the_source(tmp_path):
    """Numbers whose names a dataset keeps, under names of their own."""
    features = Features({"w": [Value("string")], "pos": [ClassLabel(names=["DET", "NOUN"])]})
    Dataset.from_dict({"w": [["the", "film"]] * 20, "pos": [[0, 1]] * 20}, features=features).save_to_disk(
        str(tmp_path / "tags")
    )
    options = DataOptions(str(tmp_path / "tags"), text_column="w", label_column="pos")
    data = RecipeData(options, "token-classification")
    assert data.labels == ["DET", "NOUN"] and data.texts["train"][0] == {
        "words": ["the", "film"],
        "tags": ["DET", "NOUN"],
    }


def opened(tmp_path, task, rows, **options):
    write(tmp_path / f"{task}.jsonl", rows)
    return RecipeData(DataOptions(str(tmp_path / f"{task}.jsonl"), max_length=16, **options), task).opened


ODD = [  # task, what is changed in the rows, the sentence
    ("question-answering", asked, {"answers": {"x": 1}}, "train, row 1: The column 'answers' must hold"),
    ("question-answering", asked, {"answers": {"text": ["film"], "answer_start": ["here"]}}, "must be a whole number"),
    ("question-answering", asked, {"context": ["a", "b"]}, "The column 'context' must hold a text, and holds"),
    ("multiple-choice", chosen, {"choices": {"x": ["good"]}}, "The column 'choices' must hold lists of texts"),
    ("multiple-choice", chosen, {"label": 7}, "row 1: The label '7' of 'the film was bad a' is none of its 2 choices"),
    ("multi-label-classification", several, {"text": ["a", "b"]}, "The column 'text' must hold a text, and holds"),
    ("multi-label-classification", several, {"labels": [["a"]]}, "The column 'labels' must hold lists of labels"),
    ("regression", scored, {"text": ["a", "b"]}, "The column 'text' must hold a text, and holds"),
    ("regression", scored, {"score": "1e400"}, "holds 1e400, which is too large for float32"),
    ("token-classification", tagged, {"tags": ["X"]}, "train, row 1: 5 words and 1 tags"),
]  # fmt: skip


@pytest.mark.parametrize(
    "task, row, changes, sentence", ODD, ids=lambda value: getattr(value, "__name__", str(value))[:24]
)
def test_a_row_that_holds_something_else_is_named_with_its_place(task, row, changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        opened(tmp_path, task, [{**row(i), **changes} for i in range(30)])


@pytest.mark.parametrize("zero, one", [(0, 1), (0.0, 1.0), (False, True)], ids=["whole", "fractions", "truths"])
def test_a_number_for_each_label_is_a_list_of_the_labels_that_are_one(zero, one, tmp_path):
    rows = [{"text": f"film {i}", "labels": [one if i % 2 else zero, one, zero if i % 3 else one]} for i in range(40)]
    texts = opened(tmp_path, "multi-label-classification", rows, label_names=["good", "seen", "long"])
    assert texts.names == ["good", "seen", "long"]
    for split in texts.splits.values():
        for row in split:
            number = int(row["text"].split()[1])
            assert row["label"] == ["good"] * (number % 2) + ["seen"] + ["long"] * (number % 3 == 0)


def test_a_label_is_the_mark_of_its_choice_as_arc_writes_them(tmp_path):
    choices = {"text": ["good", "bad", "long"], "label": ["1", "2", "3"]}
    rows = [{"question": f"film {i}", "choices": choices, "answerKey": str(i % 3 + 1)} for i in range(40)]
    for split in opened(tmp_path, "multiple-choice", rows).splits.values():
        assert all(row["label"] == int(row["text"].split()[1]) % 3 for row in split)


@pytest.mark.parametrize("task, row, changes", [
    ("token-classification", tagged, {"tags": ["NEW"] * 5}),
    ("multi-label-classification", several, {"labels": ["NEW"]}),
    ("multiple-choice", chosen, {"choices": ["a", "b", "c"]}),
], ids=["tags", "labels", "choices"])  # fmt: skip
def test_what_training_never_sees_is_told_when_the_texts_are_opened(task, row, changes, tmp_path):
    write(tmp_path / "train.jsonl", [row(i) for i in range(30)])
    write(tmp_path / "test.jsonl", [{**row(i), **changes} for i in range(5)])
    with pytest.raises(ValueError, match=f"The test split of {tmp_path} has .* its train split has"):
        RecipeData(DataOptions(str(tmp_path)), task).opened  # noqa: B018


def test_answers_as_squad_writes_them_in_a_list_and_a_row_without_tags(tmp_path):
    rows = [{**asked(i), "answers": [{"text": "film", "answer_start": 4}]} for i in range(30)]
    split = opened(tmp_path, "question-answering", rows).splits["train"]
    assert split[0]["answers"] == ["film"] and split[0]["start"] == 4
    rows = [{**tagged(i), **({"tags": None} if i == 3 else {})} for i in range(30)]
    assert sum(map(len, opened(tmp_path, "token-classification", rows).splits.values())) == 29


def test_a_column_of_scores_is_a_number_to_predict_and_none_where_it_holds_words(tmp_path):
    model = tiny_folder(tmp_path / "model", task="mlm")
    for name, score, task in (("whole", 3, "regression"), ("words", "high", "masked-lm")):
        write(tmp_path / f"{name}.jsonl", [{"text": "film", "score": score}] * 30)
        assert task_of(model, DataOptions(str(tmp_path / f"{name}.jsonl"))) == task
