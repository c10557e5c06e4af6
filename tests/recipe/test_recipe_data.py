"""What models are given of a user's texts: what does not fit is refused before anything runs, the rest is told."""

import json
import logging

import pytest
from helpers import tiny_model
from recipe_run import QUICK, TRAIN, reviews, tiny_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_compress import Recipe
from hf_compress.commands.main import main
from hf_compress.recipe.data import DataOptions, RecipeData

NAMES = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}


def recipe(stages, model, source, **data):
    return Recipe(stages, model=model, data={"source": str(source), "max_length": 16, **data})


def refused(message, stages, model, source, tmp_path, **data):
    with pytest.raises(ValueError, match=message):
        recipe(stages, model, source, **data).run(tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing has run"


def numbered(file, labels, number=60):
    rows = [f"the film was {'abcdefghij'[i % 10]} {i},{labels[i % len(labels)]}" for i in range(number)]
    file.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("labels", [range(12), [0, 1, 3, 11]], ids=["all classes", "some classes"])
def test_the_numbers_of_a_stock_teacher_are_its_classes(labels, tmp_path):
    source = numbered(tmp_path / "numbers.csv", list(labels), number=120)
    model = tiny_folder(tmp_path / "model", num_labels=12)
    data = RecipeData(DataOptions(str(source), max_length=16), "sequence-classification")
    tokenizer, config = data.tokenizer(model), AutoModelForSequenceClassification.from_pretrained(model).config
    data.check_labels(config, "The teacher")
    for split, rows in data.tokenized(tokenizer, config).items():
        for row, text in zip(rows, data.texts[split]["text"], strict=True):
            assert row["labels"] == list(labels)[int(text.split()[-1]) % len(labels)]


def test_names_that_the_model_knows_keep_its_numbers(tmp_path):
    source = reviews(tmp_path / "r.csv")
    model = tiny_folder(tmp_path / "model", **NAMES)
    result = recipe([{"fine-tune": {**TRAIN, "max_steps": 1}}], model, source).run(tmp_path / "out")
    assert AutoModelForSequenceClassification.from_pretrained(result.model).config.id2label == NAMES["id2label"]
    data = RecipeData(DataOptions(str(source), max_length=16), "sequence-classification")
    config = AutoModelForSequenceClassification.from_pretrained(model).config
    rows = data.tokenized(data.tokenizer(model), config)["train"]
    for row, text in zip(rows, data.texts["train"]["text"], strict=True):
        assert row["labels"] == ("good" not in text)


OTHERS = {"id2label": {0: "spam", 1: "ham"}, "label2id": {"spam": 0, "ham": 1}}


@pytest.mark.parametrize("names", [{"num_labels": 2}, OTHERS, {"num_labels": 3}],
                         ids=["without names", "other names", "another number"])  # fmt: skip
def test_labels_that_fit_no_model_are_refused_with_both_lists(names, tmp_path):
    model = tiny_folder(tmp_path / "model", **names)
    known = list(tiny_model("bert", **names).config.id2label.values())
    message = rf"predicts the labels \['{known[0]}'.* but .* has \['neg', 'pos'\]"
    refused(message, [{"distil": TRAIN}], model, reviews(tmp_path / "r.csv"), tmp_path)
    if known == ["LABEL_0", "LABEL_1"]:  # the order can be given
        told = recipe([{"quantize": {}}], model, tmp_path / "r.csv", label_names=["pos", "neg"]).run(tmp_path / "out")
        assert told.stages[0]["kind"] == "quantize"


def test_a_folder_without_tokenizer_is_refused_or_given_one(tmp_path, caplog):
    whole, bare = tiny_folder(tmp_path / "whole", **NAMES), tmp_path / "bare"
    tiny_model("bert", **NAMES).save_pretrained(bare)
    source = reviews(tmp_path / "r.csv")
    stages = [{"fine-tune": {**TRAIN, "max_steps": 1}}, {"prune": {"method": "vocabulary"}}, {"evaluate": QUICK}]
    refused(f"{bare} has no tokenizer .* with the option `tokenizer` of the data", stages, bare, source, tmp_path)
    result = recipe(stages, bare, source, tokenizer=str(whole)).run(tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(result.model)) < 64  # later stages go on with that beside their model
    command = ["quantize", "--model", str(bare), "--data", str(source), "--max-length", "16", "--output"]
    assert main([*command, str(tmp_path / "no")]) == 2
    assert main([*command, str(tmp_path / "yes"), "--tokenizer", str(whole)]) == 0


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model, other = tmp_path / "model", tiny_folder(tmp_path / "other")
    tiny_model("bert", vocab_size=8, **NAMES).save_pretrained(model)
    with pytest.raises(ValueError, match="gives a token 20, but the model has 8"):
        recipe([{"prune": {"heads": 0.5}}], model, reviews(tmp_path / "r.csv"), tokenizer=str(other)).run(
            tmp_path / "o"
        )


@pytest.mark.parametrize("family, longest", [("bert", 64), ("roberta", 63), ("distilbert", 64)])
def test_more_tokens_than_positions_are_refused(family, longest, tmp_path):
    model = tiny_folder(tmp_path / "model", family, **NAMES)
    source = reviews(tmp_path / "r.csv")
    stages, message = [{"fine-tune": TRAIN}], f"reads {longest} tokens at most: set max_length to {longest} or less"
    refused(message, stages, model, source, tmp_path, max_length=longest + 1)
    short = tiny_folder(tmp_path / "short", max_position_embeddings=32, **NAMES)
    for option in ("teacher", "student"):
        stages = [{"distil": {**TRAIN, option: str(short)}}]
        refused("reads 32 tokens at most", stages, model, source, tmp_path, max_length=longest)
    data = RecipeData(DataOptions(str(source)), "sequence-classification")  # no length is given
    for folder, cut in ((model, longest), (short, 32)):
        data.check_length(folder)
        assert data.max_length == cut
    command = ["compare", str(model), str(short), "--data", str(source), "--max-length", str(longest), "--output"]
    assert main([*command, str(tmp_path / "report")]) == 2


def test_rows_without_labels_are_learnt_from_and_not_measured(tmp_path):
    source = tmp_path / "some.csv"
    rows = [
        f"the film was {'good' if i % 2 else 'bad'} {i},{['neg', 'pos'][i % 2] if i < 40 else ''}" for i in range(60)
    ]
    source.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    model = tiny_folder(tmp_path / "model", **NAMES)
    data = RecipeData(DataOptions(str(source), max_length=16), "sequence-classification")
    config = AutoModelForSequenceClassification.from_pretrained(model).config
    tokenizer = data.tokenizer(model)
    assert len(data.tokenized(tokenizer, config)["train"]) == 28
    every = data.tokenized(tokenizer, config, unlabelled=True)
    assert every["train"]["labels"].count(-100) == 20 and len(every["train"]) == 48
    assert -100 not in every["test"]["labels"]
    stages = [{"distil": {**TRAIN, "num_hidden_layers": 2, "alpha": 0.5}}, {"evaluate": QUICK}]
    result = recipe(stages, model, source).run(tmp_path / "out")
    assert json.loads((result.output / "report.json").read_text(encoding="utf-8"))["num_examples"] == 8


def test_texts_without_any_label_are_distilled_and_nothing_else(tmp_path):
    source = tmp_path / "plain.txt"
    source.write_text("".join(f"the film was {'good' if i % 2 else 'bad'} {i}\n" for i in range(40)), encoding="utf-8")
    model = tiny_folder(tmp_path / "model", **NAMES)
    distil = {"distil": {**TRAIN, "num_hidden_layers": 2, "alpha": 1.0}}
    assert recipe([distil], model, source).run(tmp_path / "out").model.is_dir()
    refused("needs a column named one of", [distil, {"evaluate": {}}], model, source, tmp_path / "second")


def test_a_split_without_labels_is_not_measured(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "validation"):
        reviews(folder / f"{name}.csv")
    (folder / "test.csv").write_text("text\nthe film was good\n", encoding="utf-8")
    model = tiny_folder(tmp_path / "model", **NAMES)
    refused("The test split of .* has no labels", [{"quantize": {}}, {"evaluate": QUICK}], model, folder, tmp_path)
    recipe([{"evaluate": {**QUICK, "split": "validation"}}], model, folder).run(tmp_path / "out")


def test_pairs_go_through_a_whole_recipe(tmp_path):
    source = tmp_path / "pairs.tsv"
    rows = [f"the film was {['good', 'bad'][i % 2]}\tthe {'good' if i % 4 < 2 else 'bad'} film {'abcdefghij'[i % 10]}"
            f"\t{['same', 'other'][(i % 2) ^ (i % 4 > 1)]}" for i in range(60)]  # fmt: skip
    source.write_text("\n".join(["premise\thypothesis\tlabel", *rows]) + "\n", encoding="utf-8")
    model = tiny_folder(tmp_path / "model")
    data = RecipeData(DataOptions(str(source), max_length=16), "sequence-classification")
    tokenizer = data.tokenizer(model)
    row, texts = data.tokenized(tokenizer)["train"][0], data.texts["train"][0]
    assert row["input_ids"] == tokenizer(texts["text"], texts["text_pair"])["input_ids"]
    assert set(row["token_type_ids"]) == {0, 1}
    stages = [
        {"fine-tune": TRAIN},
        {"prune": {"method": "vocabulary"}},
        {"prune": {"heads": 0.5, "neurons": 0.5}},
        {"distil": {**TRAIN, "teacher": "vocabulary"}},
        {"quantize": {"method": "gptq", "calibration_examples": 8, "group_size": -1}},
        {"evaluate": {**QUICK, "models": "fine-tune"}},
    ]
    result = recipe(stages, model, source).run(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(result.model).get_vocab()
    assert {"was", "j"} <= words.keys()  # of the first text alone, and of the second
    assert "word5" not in words
    report = json.loads((result.output / "report.json").read_text(encoding="utf-8"))
    assert [entry["unknown_tokens"] for entry in report["entries"]] == [0, 0]


def test_what_was_read_is_said_before_the_first_stage_and_stands_in_the_report(tmp_path, caplog):
    source = reviews(tmp_path / "r.csv")
    source.write_text(source.read_text(encoding="utf-8") + "the film was good,\n,pos\n", encoding="utf-8")
    model = tiny_folder(tmp_path / "model", **NAMES)
    with caplog.at_level(logging.WARNING):
        result = recipe([{"evaluate": QUICK}], model, source).run(tmp_path / "out")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith(("data: ", "1/1"))]
    assert told[0] == "data: r.csv: 62 rows, separated by commas, UTF-8, with the columns text, label"
    assert "data: train: left out 1 of 62 rows, without text" in told
    assert told[-1] == "1/1 evaluate, 12 test texts"
    for name in ("report.md", "report.html", "report.json"):
        content = (result.output / name).read_text(encoding="utf-8")
        assert "left out 1 of 62 rows, without text" in content and "1 of 61 rows have no label" in content, name
