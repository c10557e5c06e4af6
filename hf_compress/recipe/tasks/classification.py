"""A text, or a pair, and what is predicted of it: one label, several labels, or a number."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Value
from transformers import PretrainedConfig

from hf_compress.model.reading import IGNORED
from hf_compress.recipe.columns import LABEL_COLUMNS, find_text_columns, named_column
from hf_compress.recipe.labels import NUMBER, have_commas, in_order, numbers_in, written
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.tasks.task import Columns, Task, find_columns, labels_head, text_in
from hf_compress.recipe.texts import Texts, open_texts, text_columns, tokenize

SCORE = "score"  # a column that holds numbers to predict
LARGEST = float(torch.finfo(torch.float32).max)
YES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}


class Classification(Task):
    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    endings = ("ForSequenceClassification",)
    needs = "a text, or the two of a pair, and a label"
    pads = True
    predicts = "labels"
    problem = "single_label_classification"

    def open(self, options, use_of_labels):
        return open_texts(
            options.source, text_column=options.text_column, label_column=options.label_column,
            label_names=options.label_names, labels=use_of_labels,
        )  # fmt: skip

    def texts(self, row):
        return (row[name] for name in ("text", "text_pair") if name in row)

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        """Labels are numbered as the model of `config` numbers them. Rows without one are left out; with `unlabelled`
        they stay in the train split, where their label is -100, or where no row has one, there is no such column."""
        splits = texts.splits
        if not texts.names:
            columns = text_columns(splits["train"])
            bare = DatasetDict({name: split.select_columns(columns) for name, split in splits.items()})
            return tokenize(bare, tokenizer, max_length)
        numbers = list(range(len(texts.names))) if config is None else self.numbers(config, texts)
        if numbers is None:
            raise RecipeError(f"The model {self.misfit(config, texts)}.")
        splits = {
            name: split if unlabelled and name == "train" else split.filter(lambda row: row["label"] is not None)
            for name, split in splits.items()
        }
        features = Features({**texts.splits["train"].features, "label": Value("int64")})
        numbered = DatasetDict(splits).map(
            lambda row: {"label": IGNORED if row["label"] is None else numbers[row["label"]]}, features=features
        )
        return tokenize(numbered, tokenizer, max_length)

    def numbers(self, config: PretrainedConfig, texts: Texts) -> list[int] | None:
        return numbers_in(config, texts.names, shared_order=texts.shared_order)

    def fits(self, config, texts):
        if not self.has_head(config) or problem(config) != self.problem:
            return False
        return not texts.names or self.numbers(config, texts) is not None

    def head(self, texts):
        return labels_head(texts.names)

    def of_teacher(self, config):
        return labels_head(config.id2label, problem_type=config.problem_type)

    def misfit(self, config, texts):
        known, kind = list(config.id2label.values()), problem(config)
        told = "a number" if kind == "regression" else f"the labels {known}"
        told += ", several at once" if kind == "multi_label_classification" else ""
        theirs = texts.names or ("numbers" if self.problem == "regression" else "none")
        theirs = f"lists of {theirs}" if self.problem == "multi_label_classification" else theirs
        has = f"predicts {told}" if self.has_head(config) else "has no head for labels"
        return f"{has}, but {texts.source} has {theirs}"


def problem(config: PretrainedConfig) -> str:
    """What a classifier predicts, as its config says it or Transformers will find."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


class _TextTask(Classification):
    """A text or a pair with labels that are not one of several classes."""

    def find(self, columns, source, options):
        texts = find_text_columns(options.text_column, columns, source, pairs=True)
        return dict(zip(("text", "text_pair"), texts, strict=False))

    def row(self, given, columns):
        texts = {usual: text_in(given[own], own) for usual, own in columns.items() if usual.startswith("text")}
        label = self.label(given, columns)
        return {**texts, "label": label} if label is not None and all(texts.values()) else None

    def label(self, given: Mapping[str, Any], columns: Columns) -> Any:
        raise NotImplementedError

    def open(self, options, use_of_labels):
        return Task.open(self, options, use_of_labels)

    def features_of(self, columns):
        texts = [usual for usual in columns if usual.startswith("text")]
        return Features({**dict.fromkeys(texts, Value("string")), "label": self.label_feature})

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        return tokenize(self.numbered(texts, config), tokenizer, max_length)

    def numbered(self, texts: Texts, config: PretrainedConfig | None) -> DatasetDict:
        return texts.splits


class Regression(_TextTask):
    name = "regression"
    needs = "a text, or the two of a pair, and a number"
    problem = "regression"
    label_feature = Value("float32")

    def find(self, columns, source, options):
        texts = super().find(columns, source, options)
        names = (SCORE, *LABEL_COLUMNS)
        return {**texts, **find_columns(self, {"label": names}, {"label": options.label_column}, columns, source)}

    def label(self, given, columns):
        found = written(given[columns["label"]])
        if found is not None and not NUMBER.fullmatch(found):
            advice = "write it with a point" if have_commas([found]) else self.name
            raise RecipeError(f"The column {columns['label']!r} must hold numbers, and holds {found!r}: {advice}.")
        if found is not None and abs(float(found)) > LARGEST:
            raise RecipeError(f"The column {columns['label']!r} holds {found}, which is too large for float32.")
        return None if found is None else float(found)

    def fits(self, config, texts):
        return self.has_head(config) and problem(config) == self.problem

    def head(self, texts):
        return {"num_labels": 1, "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": self.problem}


class SeveralLabels(_TextTask):
    """`label_column` is one that holds a list of labels, or several, with commas, that hold 0 or 1."""

    name = "multi-label-classification"
    needs = "a text, or the two of a pair, and a list of labels (or a column of 0 and 1 for each)"
    problem = "multi_label_classification"
    label_column_help = "label_column (one column of lists, or several with commas)"
    label_feature = [Value("string")]

    def find(self, columns, source, options):
        texts = super().find(columns, source, options)
        if options.label_column and "," in options.label_column:
            own = [named_column(name, columns, source) for name in options.label_column.split(",")]
            return {**texts, **{f"label {name}": name for name in own}}
        names = (*LABEL_COLUMNS, "tags", "topics")
        return {**texts, **find_columns(self, {"labels": names}, {"labels": options.label_column}, columns, source)}

    def label(self, given, columns):
        if "labels" in columns:
            found = given[columns["labels"]]
            if found is not None and not isinstance(found, (list, tuple)):
                raise RecipeError(
                    f"The column {columns['labels']!r} must hold lists of labels, and holds {found!r}. Name a column "
                    "of 0 and 1 for each label, with commas, as label_column."
                )
            if any(isinstance(one, (list, tuple, dict)) for one in found or ()):
                raise RecipeError(
                    f"The column {columns['labels']!r} must hold lists of labels, and holds {found!r:.60}."
                )
            return None if found is None else [name for one in found if (name := written(one)) is not None]
        chosen = []
        for name in (own for usual, own in columns.items() if usual.startswith("label ")):
            truth = YES.get((written(given[name]) or "").lower())
            if truth is None:
                raise RecipeError(f"The column {name!r} must hold 0 or 1, and holds {given[name]!r}.")
            chosen += [name] * truth
        return chosen

    def settled(self, rows, options, source):
        """Lists of a 0 or 1 for each label, as Transformers takes them, become the labels that are 1."""
        lists = [labels for split in rows.values() for labels in split["label"]]
        size = len(lists[0])
        if size < 2 or any(len(labels) != size or not {*map(str.lower, labels)} <= {*YES} for labels in lists):
            return rows
        names = list(options.label_names or map(str, range(size)))
        if len(names) != size:
            raise RecipeError(f"{source} has a 0 or 1 for each of {size} labels, but label_names are {names}.")
        chosen = lambda labels: [name for name, one in zip(names, labels, strict=True) if YES[one.lower()]]  # noqa: E731
        return {n: split.map(lambda row: {"label": chosen(row["label"])}, desc="Reading") for n, split in rows.items()}

    def names(self, train, options, source):
        found = set(chain.from_iterable(train["label"]))
        if options.label_column and "," in options.label_column:
            found |= {name.strip() for name in options.label_column.split(",")}
        names, shared = (list(options.label_names), True) if options.label_names else in_order(found, source)
        if len(names) < 2 or found - set(names):
            raise RecipeError(f"{source} has the labels {sorted(found)}: two or more are needed, among label_names.")
        return names, shared

    def check_held_out(self, rows, train, names, where):
        if unknown := sorted(set(chain.from_iterable(rows["label"])) - set(names)):
            raise RecipeError(f"{where} has labels {unknown} that its train split has not.")

    def numbered(self, texts, config):
        numbers = list(range(len(texts.names))) if config is None else self.numbers(config, texts)
        if numbers is None:
            raise RecipeError(f"The model {self.misfit(config, texts)}.")
        places = dict(zip(texts.names, numbers, strict=True))
        size = len(numbers) if config is None else config.num_labels

        def vector(row: Mapping[str, Any]) -> dict[str, list[float]]:
            chosen = {places[name] for name in row["label"]}
            return {"label": [float(number in chosen) for number in range(size)]}

        features = Features({**texts.splits["train"].features, "label": [Value("float32")]})
        return DatasetDict({n: Dataset.from_list([{**r, **vector(r)} for r in split], features=features)
                            for n, split in texts.splits.items()})  # fmt: skip

    def head(self, texts):
        return labels_head(texts.names, problem_type=self.problem)


def told_by_values(train: Dataset, label: str) -> type[Task]:
    """One label, several, or a number: by what the first rows of a column hold."""
    values = [value for value in train.select(range(min(len(train), 1000)))[label] if value is not None]
    if any(isinstance(value, (list, tuple)) for value in values):
        return SeveralLabels
    texts: Sequence[str] = [text for value in values if (text := written(value)) is not None]
    if have_commas(texts):
        return Regression  # which says how they are written
    numbers = [float(text) for text in texts if NUMBER.fullmatch(text)]
    are_numbers = len(numbers) == len(texts) > 0
    is_score = label.strip().lower() == SCORE
    return Regression if are_numbers and (is_score or not all(map(float.is_integer, numbers))) else Classification
