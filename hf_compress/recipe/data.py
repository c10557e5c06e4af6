"""The texts of a recipe: opened once, tokenized as the model of each stage wants them, known by their content."""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from hf_compress.model.reading import num_positions_of, open_tokenizer
from hf_compress.recipe.columns import labels_of
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.tasks.classification import Classification
from hf_compress.recipe.tasks.table import TASKS
from hf_compress.recipe.texts import Texts
from hf_compress.training.ranks import is_main

logger = logging.getLogger(__name__)

CLASSIFICATION = Classification.name
MAX_LENGTH = 128  # where none is given
HASHED_ROWS = 1000  # read at one time


@dataclass
class DataOptions:
    source: str = field(metadata={"help": "A CSV, JSON or text file, a folder of train, validation and test files, "
                                          "`bbc-news`, or a dataset of the Hub."})  # fmt: skip
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the texts (questions, words), where it is not called text, sentence, review, ...; two "
            "with a comma for pairs, and for question and context."
        },
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels, tags, answers or target texts, where it is not called "
                                        "label, class, topic, tags, answers, target, ..."}
    )  # fmt: skip
    choices_column: str | None = field(
        default=None, metadata={"help": "Column of the lists of choices, or the columns of each, with commas."}
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "The classes in the order of the model's numbers, where it does not name them, "
                                        "with commas."}
    )  # fmt: skip
    tokenizer: str | None = field(
        default=None, metadata={"help": "A folder or Hub name with the tokenizer, where the model has none beside it."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Texts are cut after so many tokens; 128, or what the models read, if less."}
    )
    max_examples: int | None = field(default=None, metadata={"help": "Use only so many examples of each split."})
    dataset_name: str | None = field(default=None, metadata={"help": "What reports call the data."})

    def __post_init__(self):
        for name, least in (("max_length", 2), ("max_examples", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


class RecipeData:
    """What a recipe trains and is measured on. Raises ValueError, when first used, for data that cannot be opened."""

    def __init__(
        self,
        options: DataOptions,
        task: str,
        *,
        needs_labels: bool = False,
    ):
        self.options, self.task, self.kind = options, task, TASKS[task]()
        self.max_length = options.max_length or MAX_LENGTH  # see `check_length`
        self.use_of_labels = "needed" if needs_labels else "used"

    @property
    def name(self) -> str:
        return self.options.dataset_name or self.options.source.rstrip("/").rpartition("/")[2]

    @cached_property
    def opened(self) -> Texts:
        options = self.options
        opened = self.kind.open(options, self.use_of_labels)
        splits, notes, most = opened.splits, list(opened.notes), options.max_examples
        if most is not None:
            notes += [f"{n}: the first {most} of {len(s)} rows alone" for n, s in splits.items() if len(s) > most]
            splits = DatasetDict({n: s.select(range(min(most, len(s)))) for n, s in splits.items()})
        if empty := [name for name, split in splits.items() if not len(split)]:
            raise RecipeError(f"{options.source}: the splits {empty} are empty.")
        return replace(opened, splits=splits, notes=tuple(notes))

    @property
    def texts(self) -> DatasetDict:
        """Examples under the usual names of their columns. A classification's `label` is None where there is none."""
        return self.opened.splits

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read, what was left out and why, and how many examples of each class there are."""
        return self.opened.notes

    @cached_property
    def fingerprint(self) -> str:
        """Of the texts and labels themselves, wherever they are from, and of how they are cut."""
        content = hashlib.sha256(repr((self.task, self.max_length)).encode())
        if self.options.tokenizer:
            content.update(repr(sorted(open_tokenizer(self.options.tokenizer).get_vocab().items())).encode())
        for name, split in sorted(self.texts.items()):
            content.update(f"{name} {split.features}".encode())
            for start in range(0, len(split), HASHED_ROWS):
                content.update(repr(split[start : start + HASHED_ROWS]).encode())
        return content.hexdigest()

    @property
    def labels(self) -> list[str]:
        """Names of the classes; none where no row has a label."""
        return self.opened.names

    def check_labelled(self, split: str) -> None:
        """Raise ValueError where a split has no label, which training on labels and measuring need."""
        if self.task != CLASSIFICATION:
            return  # rows that lack anything are left out
        if not self.labels or all(number is None for number in labels_of(self.texts[split])):
            raise RecipeError(f"The {split} split of {self.options.source} has no labels: choose another split.")

    def count(self, split: str, *, labelled: bool) -> int:
        """Texts of a split; with `labelled`, those with a label, where any has one."""
        texts = self.texts[split]
        has_label = labelled and self.task == CLASSIFICATION and self.labels
        return sum(one is not None for one in labels_of(texts)) if has_label else len(texts)

    def training_texts(self) -> Iterator[str]:
        """All texts of the train split that a model reads or writes."""
        return chain.from_iterable(self.kind.texts(row) for row in self.texts["train"])

    def tokenizer(self, source: str | Path) -> PreTrainedTokenizerBase:
        """That beside a model, or the one that the options name. A classifier of last tokens gets one that pads."""
        tokenizer = load_tokenizer(source, self.options.tokenizer)
        if self.kind.pads and tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None, *, unlabelled: bool = False,
        measured: bool = False,
    ) -> DatasetDict:  # fmt: skip
        """Rows for `Trainer`, or with `measured` for a metric. With `config`, labels are numbered as that model does.

        With `unlabelled`, rows of a classification that have no label stay in the train split.
        """
        tokenizer = copy.deepcopy(tokenizer)  # cutting texts is remembered by a tokenizer, and saved with it
        encoded = self.kind.encode(self.opened, tokenizer, config, max_length=self.max_length, unlabelled=unlabelled,
                                   measured=measured)  # fmt: skip
        size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
        for split in encoded.values() if size else ():
            rows = (ids for rows in split.iter(HASHED_ROWS) for ids in rows["input_ids"])
            largest = max((np.max(np.concatenate(ids) if isinstance(ids[0], list) else ids) for ids in rows if ids),
                          default=0)  # fmt: skip
            if largest >= size:
                raise RecipeError(
                    f"The tokenizer gives a token {largest}, but the model has {size}: they do not belong together."
                )
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        return self.kind.collator(tokenizer)

    def tell(self) -> None:
        """Say, in the first of several processes, what was read."""
        for note in self.notes if is_main() else ():
            logger.warning("data: %s", note)

    def fits(self, config: PretrainedConfig) -> bool:
        """Whether a model has a head that predicts the labels of this data."""
        return self.kind.fits(config, self.opened)

    def check_labels(self, config: PretrainedConfig, what: str) -> None:
        """Raise RecipeError when a model cannot have learned the labels of this data."""
        if not self.fits(config):
            raise RecipeError(
                f"{what} {self.kind.misfit(config, self.opened)}. Begin with a fine-tune stage, which gives it a new "
                "head, or use a model of this task, or say another --task. Where only the names of labels differ, give "
                "those of the data in the order of the model's numbers as label_names."
            )

    def check_length(self, source: str | Path) -> None:
        """Raise RecipeError where texts are cut after more tokens than the model at `source` has positions.

        Where no length was given, texts are cut for it from now on.
        """
        longest = num_positions_of(AutoConfig.from_pretrained(source))
        if longest is None or self.max_length <= longest:
            return
        if self.options.max_length is not None:
            raise RecipeError(
                f"max_length is {self.max_length}, but {source} reads {longest} tokens at most: set max_length to "
                f"{longest} or less."
            )
        self.max_length = longest
        logger.warning("data: texts are cut after %d tokens, which is what %s reads", longest, source)


def load_tokenizer(source: str | Path, other: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; where it has none, the `other`. Raises RecipeError where neither is there."""
    try:
        tokenizer = open_tokenizer(source)
    except ValueError as error:
        if other is None:
            raise RecipeError(f"{error} Or name another one with the option `tokenizer` of the data.") from error
        return open_tokenizer(other)
    if other is not None and tokenizer.get_vocab() != open_tokenizer(other).get_vocab():
        logger.warning("%s has a tokenizer of its own, which is used in place of %s.", source, other)
    return tokenizer
