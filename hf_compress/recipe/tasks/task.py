"""What a recipe asks of a task: its columns, its rows as tokens, the head that learns it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from datasets import ClassLabel, Dataset, DatasetDict, Features
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_compress.model.reading import PaddingCollator
from hf_compress.recipe.columns import named_column
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.texts import Texts, open_splits, with_all_splits

Columns = Mapping[str, str]  # usual name -> the one in the source


class Task:
    """One task. The methods that raise here are what each task says for itself."""

    name: str
    auto_class: str  # of Transformers
    endings: tuple[str, ...]  # of the classes of its models
    needs: str  # the columns, in words
    label_column_help = "label_column"
    is_trained_on_labels = True  # False where a fine-tune stage has nothing to learn, nor a validation to measure
    pads = False  # whether the model finds a text's end by its padding token
    predicts: str  # in words, for messages
    features: Features  # of the rows that `row` makes

    # Reading

    def find(self, columns: Sequence[str], source: str, options: Any) -> Columns:
        """Where the columns are. Raises RecipeError where one of them is not there."""
        raise NotImplementedError

    def row(self, given: Mapping[str, Any], columns: Columns) -> dict[str, Any] | None:
        """An example under its usual names; None where something of it is missing."""
        raise NotImplementedError

    def features_of(self, columns: Columns) -> Features:
        return self.features

    def names(self, train: Dataset, options: Any, source: str) -> tuple[list[str], bool]:
        """The names of the classes, and whether their order is one that others share."""
        return [], True

    def open(self, options: Any, use_of_labels: Literal["needed", "used", "not used"]) -> Texts:
        """The splits of `options.source`; rows that lack something are left out and counted."""
        source = options.source
        splits, notes = open_splits(source)
        columns = self.find(splits["train"].column_names, source, options)
        notes.append(f"{self.name}: {', '.join(f'{usual} from {own}' for usual, own in columns.items())}")
        rows = {}
        for name, split in splits.items():
            found = [
                self._row(given, columns, f"{source}, {name}, row {n}") for n, given in enumerate(with_names(split), 1)
            ]
            whole = [row for row in found if row is not None]
            if len(whole) < len(found):
                notes.append(f"{name}: left out {len(found) - len(whole)} of {len(found)} rows, without {self.needs}")
            if not whole:
                raise RecipeError(f"No row of the {name} split of {source} has {self.needs}.")
            rows[name] = Dataset.from_list(whole, features=self.features_of(columns))
        rows = self.settled(rows, options, source)
        names, shared = self.names(rows["train"], options, source)
        for name in ("validation", "test"):
            if name in rows:
                self.check_held_out(rows[name], rows["train"], names, f"The {name} split of {source}")
        named = with_all_splits(DatasetDict(rows), [], source)
        notes += [f"{name}: {len(split)} rows" for name, split in named.items()]
        notes += [f"classes: {', '.join(names)}"] * bool(names)
        return Texts(named, names, shared, tuple(notes), source)

    def settled(self, rows: dict[str, Dataset], options: Any, source: str) -> dict[str, Dataset]:
        """The rows of all splits, where what one means shows in all of them alone."""
        return rows

    def check_held_out(self, rows: Dataset, train: Dataset, names: Sequence[str], where: str) -> None:
        """Raise RecipeError for what training never sees, before any of it."""

    def _row(self, given: Mapping[str, Any], columns: Columns, where: str) -> dict[str, Any] | None:
        try:
            return self.row(given, columns)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        """What a model reads and writes of an example."""
        raise NotImplementedError

    # Tokens

    def encode(
        self, texts: Texts, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None, *, max_length: int,
        unlabelled: bool, measured: bool,
    ) -> DatasetDict:  # fmt: skip
        """Rows for `Trainer`; with `measured` also those of the train split as a metric reads them."""
        raise NotImplementedError

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        return PaddingCollator(tokenizer)

    # Heads

    def has_head(self, config: PretrainedConfig) -> bool:
        return any(name.endswith(self.endings) for name in config.architectures or [])

    def fits(self, config: PretrainedConfig, texts: Texts) -> bool:
        """Whether a model has a head for these labels."""
        return self.has_head(config)

    def head(self, texts: Texts) -> dict[str, Any]:
        """What the config of a fresh head says; empty where a model needs none but its class's own."""
        return {}

    def of_teacher(self, config: PretrainedConfig) -> dict[str, Any]:
        """What the config of a head like that of a teacher says."""
        return {}

    def misfit(self, config: PretrainedConfig, texts: Texts) -> str:
        """Why a model does not fit, for a sentence that begins with its name."""
        return f"has no head for {self.predicts}, but {texts.source} is for {self.name}"


def with_names(split: Dataset) -> Dataset:
    """The rows with the names of classes in place of their numbers; None for -1, which is no class."""
    classes = {n: f for n, f in split.features.items() if isinstance(getattr(f, "feature", f), ClassLabel)}
    if not classes:
        return split

    def named(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [named(one, names) for one in value]
        return None if value is None or value < 0 else names[value]

    def rename(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            n: None if row[n] is None else named(row[n], getattr(f, "feature", f).names) for n, f in classes.items()
        }

    return Dataset.from_list([{**row, **rename(row)} for row in split])


def text_in(value: Any, column: str) -> str | None:
    """A text as it stands in a row, None for nothing but white space. Raises RecipeError for a list or a mapping."""
    if isinstance(value, (list, tuple, dict)):
        raise RecipeError(f"The column {column!r} must hold a text, and holds {value!r:.60}.")
    text = None if value is None or value != value else str(value)
    return text if text is not None and text.strip() else None


def for_training(splits: DatasetDict, measured: Sequence[str]) -> DatasetDict:
    """The rows without what a metric alone reads, in the split that is trained on."""
    return DatasetDict({n: split.remove_columns(measured) if n == "train" else split for n, split in splits.items()})


def labels_head(names: Mapping[int, str] | Sequence[str], **more: Any) -> dict[str, Any]:
    """What a config says of a head that predicts these labels."""
    by_number = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    return {
        "num_labels": len(by_number),
        "id2label": by_number,
        "label2id": {n: i for i, n in by_number.items()},
        **more,
    }


def find_columns(
    task: Task,
    wanted: Mapping[str, Sequence[str]],
    given: Mapping[str, str | None],
    columns: Sequence[str],
    source: str,
) -> Columns:
    """usual name -> column: the one that was named, or the first of those that usually hold it."""
    known = {column.strip().lower(): column for column in columns}
    found = {}
    for usual, names in wanted.items():
        if given.get(usual) is not None:
            found[usual] = named_column(given[usual], columns, source)
            continue
        taken = {*found.values(), *filter(None, given.values())}
        own = next((known[name] for name in names if name in known and known[name] not in taken), None)
        if own is None:
            raise RecipeError(
                f"{source} has the columns {list(columns)}, but {task.name} needs {task.needs}. Name them with "
                f"text_column and {task.label_column_help}, or say another --task."
            )
        found[usual] = own
    return found
