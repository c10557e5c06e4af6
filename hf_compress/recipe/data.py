"""The texts of a recipe: opened once, tokenized as the model of each stage wants them, known by their content."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

from datasets import ClassLabel, DatasetDict
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.texts import label_names, load_plain_texts, load_texts, tokenize

CLASSIFICATION, LANGUAGE_MODEL = "sequence-classification", "causal-lm"
TASKS = {CLASSIFICATION: "AutoModelForSequenceClassification", LANGUAGE_MODEL: "AutoModelForCausalLM"}
HASHED_ROWS = 1000  # read at one time


@dataclass
class DataOptions:
    source: str = field(metadata={"help": "A CSV, JSON or text file, a folder of train, validation and test files, "
                                          "`bbc-news`, or a dataset of the Hub."})  # fmt: skip
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the texts, where it is not called text, sentence, review, ..."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels, where it is not called label, class, topic, ..."}
    )
    max_length: int = field(default=128, metadata={"help": "Texts are cut after so many tokens."})
    max_examples: int | None = field(default=None, metadata={"help": "Use only so many examples of each split."})
    dataset_name: str | None = field(default=None, metadata={"help": "What reports call the data."})

    def __post_init__(self):
        if self.max_length < 2 or (self.max_examples is not None and self.max_examples < 1):
            raise ValueError(
                f"max_length must be at least 2 and max_examples at least 1, got {self.max_length} and "
                f"{self.max_examples}."
            )


class RecipeData:
    """What a recipe trains and is measured on. Raises ValueError, when first used, for data that cannot be opened."""

    def __init__(self, options: DataOptions, task: Literal["sequence-classification", "causal-lm"]):
        self.options, self.task = options, task

    @property
    def name(self) -> str:
        return self.options.dataset_name or self.options.source.rstrip("/").rpartition("/")[2]

    @cached_property
    def texts(self) -> DatasetDict:
        options = self.options
        if self.task == CLASSIFICATION:
            columns = {"text_column": options.text_column, "label_column": options.label_column}
            splits = load_texts(options.source, **columns)
        else:
            splits = load_plain_texts(options.source, text_column=options.text_column)
        if options.max_examples is not None:
            splits = DatasetDict({n: s.select(range(min(options.max_examples, len(s)))) for n, s in splits.items()})
        if empty := [name for name, split in splits.items() if not len(split)]:
            raise RecipeError(f"{options.source}: the splits {empty} are empty.")
        return splits

    @cached_property
    def fingerprint(self) -> str:
        """Of the texts and labels themselves, wherever they are from, and of how they are cut."""
        content = hashlib.sha256(repr((self.task, self.options.max_length)).encode())
        for name, split in sorted(self.texts.items()):
            content.update(f"{name} {split.features}".encode())
            for start in range(0, len(split), HASHED_ROWS):
                content.update(repr(split[start : start + HASHED_ROWS]).encode())
        return content.hexdigest()

    @property
    def labels(self) -> list[str]:
        return label_names(self.texts)

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> DatasetDict:
        """Rows for `Trainer`. With `config`, labels are numbered as that model numbers them."""
        tokenizer = copy.deepcopy(tokenizer)  # cutting texts is remembered by a tokenizer, and saved with it
        if self.task == CLASSIFICATION:
            texts = self.texts if config is None else _numbered_as(self.texts, config)
            return tokenize(texts, tokenizer, self.options.max_length)
        length = self.options.max_length

        def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids = list(chain.from_iterable(tokenizer(text)["input_ids"] + end for text in rows["text"]))
            starts = range(0, max(len(ids) - length + 1, min(len(ids), 1)), length)
            return {"input_ids": [ids[start : start + length] for start in starts]}

        encoded = self.texts.map(blocks, batched=True, remove_columns="text", desc="Tokenizing")
        return encoded.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])}, desc="Tokenizing")

    def collator(self, tokenizer: PreTrainedTokenizerBase):
        if self.task == CLASSIFICATION:
            return DataCollatorWithPadding(tokenizer)
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def check_labels(self, config: PretrainedConfig, what: str) -> None:
        """Raise RecipeError when a model cannot have learned the labels of this data."""
        has_head = any("ForSequenceClassification" in name for name in config.architectures or [])
        if self.task == CLASSIFICATION and not (has_head and has_labels(config, self.labels)):
            knows = f"predicts the labels {list(config.id2label.values())}" if has_head else "has no head for labels"
            raise RecipeError(
                f"{what} {knows}, but {self.options.source} has {self.labels}. Begin with a fine-tune stage, which "
                "gives it a new head, or use a model of this task."
            )


def has_labels(config: PretrainedConfig, labels: Sequence[str]) -> bool:
    names = [str(name) for name in config.id2label.values()]
    unnamed = all(name.startswith("LABEL_") for name in names)
    return len(names) == len(labels) and (unnamed or set(names) == set(labels))


def _numbered_as(texts: DatasetDict, config: PretrainedConfig) -> DatasetDict:
    names, wanted = label_names(texts), [str(config.id2label[i]) for i in range(config.num_labels)]
    if wanted == names or set(wanted) != set(names):
        return texts  # names of the model's own such as LABEL_0 say nothing
    numbers = [wanted.index(name) for name in names]
    renumbered = texts.map(lambda row: {"label": numbers[row["label"]]})
    return renumbered.cast_column("label", ClassLabel(names=wanted))


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"{source} has no tokenizer beside the model, which recipes need: {reason}") from error
    tokenizer.init_kwargs.pop("local_files_only", None)  # whether this machine has a network: saved with it otherwise
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
