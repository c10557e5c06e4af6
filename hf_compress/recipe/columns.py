"""The columns of a table that hold texts, one or a pair, and labels; rows without them are counted."""

from collections.abc import Iterator, Sequence

from datasets import ClassLabel, Dataset, Features, Json, Value

from hf_compress.recipe.labels import written

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
PAIRS = (
    ("text", "text_pair"), ("text_a", "text_b"), ("text1", "text2"), ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
    ("query", "passage"),
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "topic", "class", "category")
ROWS = 10_000  # looked at together


def labels_of(data: Dataset) -> Iterator:
    """The column `label`, row by row."""
    for rows in data.select_columns("label").iter(ROWS):
        yield from rows["label"]


def named_column(name: str, columns: Sequence[str], source: str) -> str:
    """The column of that name, whatever the case and the white space around it."""
    alike = [column for column in columns if column == name] or [
        column for column in columns if column.strip().lower() == name.strip().lower()
    ]
    if len(alike) != 1:
        raise ValueError(
            f"{source} needs the column {name!r}; it has {list(columns)}. Name the columns with text_column and "
            "label_column."
        )
    return alike[0]


def find_text_columns(name: str | None, columns: Sequence[str], source: str, *, pairs: bool) -> list[str]:
    """The column of the texts, or with `pairs` the two of a pair."""
    if name is not None:
        names = [name] if name in columns else name.split(",")
        if len(names) > 1 + pairs:
            most = "one name or the two of a pair" if pairs else "one name for a language model"
            raise ValueError(f"text_column takes {most}, got {name!r}.")
        return [named_column(one, columns, source) for one in names]
    known = {column.strip().lower() for column in columns}
    chosen = next((pair for pair in PAIRS if pairs and known.issuperset(pair)), None)
    chosen = chosen or next(((one,) for one in TEXT_COLUMNS if one in known), None)
    if chosen is None:
        raise ValueError(
            f"{source} needs a column named one of {list(TEXT_COLUMNS)}; it has {list(columns)}. Pairs are "
            f"{' or '.join(map('/'.join, PAIRS))}. Name the columns with text_column and label_column."
        )
    return [named_column(one, columns, source) for one in chosen]


def find_label_column(name: str | None, columns: Sequence[str], source: str) -> str | None:
    known = [column.strip().lower() for column in columns]
    name = name or next((one for one in LABEL_COLUMNS if one in known), None)
    return None if name is None else named_column(name, columns, source)


def check_plain(data: Dataset, column: str, *, split: str, source: str) -> None:
    """Raise ValueError for a row that holds a list or a mapping where one text, number or label belongs."""
    for number, value in enumerate(data[column], 1):
        if isinstance(value, (list, tuple, dict)):
            raise ValueError(
                f"The {split} split of {source} must hold one value a row in the column {column!r}, but row {number} "
                f"has {value!r:.60}."
            )


def select_rows(
    data: Dataset, texts: Sequence[str], label: str | None, *, split: str, source: str
) -> tuple[Dataset, list[str]]:
    """Rows with a text in every text column, under the usual names, their labels as texts; and what was left out."""
    for column in texts:
        if not isinstance(data.features.get(column), (Value, Json)):
            raise ValueError(
                f"The {split} split of {source} must hold texts in the column {column!r}, it has {data.features}."
            )
    classes = data.features.get(label) if label else None
    if classes is not None and not isinstance(classes, (Value, ClassLabel, Json)):
        raise ValueError(f"{source}: the column {label!r} must hold one label a row, it holds {classes}.")
    for column in [*texts, *[label] * bool(label)]:
        if isinstance(data.features.get(column), Json):  # of several kinds: 1 and "1", or a list in some rows
            check_plain(data, column, split=split, source=source)
    usual = dict(zip(("text", "text_pair"), texts, strict=False))

    def rename(rows: dict[str, list]) -> dict[str, list]:
        made = {new: [None if text is None or text != text else str(text) for text in rows[old]]
                for new, old in usual.items()}  # fmt: skip
        if label:
            given = rows.get(label, [None] * len(made["text"]))
            if isinstance(classes, ClassLabel):  # -1 is how the Hub says that a row has no label
                given = [None if number is None or number < 0 else classes.names[number] for number in given]
            made["label"] = [written(one) for one in given]
        return made

    def are_whole(rows: dict[str, list]) -> list[bool]:
        return [all((text or "").strip() for text in row) for row in zip(*(rows[name] for name in usual), strict=True)]

    features = Features(dict.fromkeys([*usual, *["label"] * bool(label)], Value("string")))
    renamed = data.map(rename, batched=True, remove_columns=data.column_names, features=features, desc="Reading")
    whole = renamed.filter(are_whole, batched=True, desc="Reading")
    if not len(whole):
        raise ValueError(f"No row of the {split} split of {source} has a text in {' and '.join(map(repr, texts))}.")
    left_out, notes = len(renamed) - len(whole), []
    if left_out:
        notes.append(f"{split}: left out {left_out} of {len(renamed)} rows, without {' or without '.join(texts)}")
    if label and (unlabelled := sum(one is None for one in labels_of(whole))):
        notes.append(
            f"{split}: {unlabelled} of {len(whole)} rows have no label: distillation learns from them, fine-tuning and "
            "evaluation leave them out"
        )
    return whole, notes
