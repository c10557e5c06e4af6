"""Texts that a model goes on with, fills in, or writes another text for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from datasets import DatasetDict, Features, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_compress.model.reading import IGNORED, PaddingCollator
from hf_compress.recipe.tasks.task import Task, find_columns, for_training
from hf_compress.recipe.texts import open_texts, tokenize

MASKED, REPLACED, KEPT = 0.15, 0.8, 0.5  # of the tokens; of these, as [MASK]; of the rest, as they are
SOURCES = ("source", "article", "document", "dialogue", "text", "input")
TARGETS = ("target", "summary", "highlights", "output", "translation")


class OfTexts(Task):
    """A language model that reads single texts, and no labels."""

    predicts = "the words of a text"
    needs = "a text"

    def open(self, options, use_of_labels):
        return open_texts(options.source, text_column=options.text_column, labels="not used")

    def texts(self, row):
        return iter((row["text"],))


class CausalLM(OfTexts):
    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    endings = ("ForCausalLM", "LMHeadModel")

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        """All texts one after another, in blocks of `max_length` tokens."""

        def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids = list(chain.from_iterable(tokenizer(text)["input_ids"] + end for text in rows["text"]))
            starts = range(0, max(len(ids) - max_length + 1, min(len(ids), 1)), max_length)
            return {"input_ids": [ids[start : start + max_length] for start in starts]}

        columns = texts.splits["train"].column_names
        encoded = texts.splits.map(blocks, batched=True, remove_columns=columns, desc="Tokenizing")
        return encoded.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])}, desc="Tokenizing")

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer, tokens_are_labels=True)


class MaskedLM(OfTexts):
    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    endings = ("ForMaskedLM", "WithLMHeadModel")

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        """Each text by itself. Rows that are measured, or held out, are masked here, always alike."""
        mask = MaskingCollator(tokenizer)

        def masked(row: Mapping, number: int) -> dict[str, list[int]]:
            chance = torch.Generator().manual_seed(number)
            ids, labels = mask.masked(torch.tensor(row["input_ids"]), torch.tensor(row["attention_mask"]), chance)
            return {"input_ids": ids.tolist(), "labels": labels.tolist()}

        encoded = tokenize(texts.splits, tokenizer, max_length)
        return DatasetDict({name: split.map(masked, with_indices=True, desc="Masking")
                            if measured or name != "train" else split for name, split in encoded.items()})  # fmt: skip

    def collator(self, tokenizer):
        return MaskingCollator(tokenizer)


@dataclass(frozen=True)
class MaskingCollator:
    """Pads, and masks rows without labels anew in each batch, as BERT was trained. Draws by the CPU's generator."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        batch = PaddingCollator(self.tokenizer)(rows)
        if "labels" not in batch:
            batch["input_ids"], batch["labels"] = self.masked(batch["input_ids"], batch["attention_mask"])
        return batch

    def masked(self, ids: Tensor, mask: Tensor, chance: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Token ids with some masked, and as labels what these were; special tokens and padding stay."""
        special = torch.tensor([token for token in self.tokenizer.all_special_ids])
        allowed = mask.bool() & ~torch.isin(ids, special)
        draws = torch.rand(3, *ids.shape, generator=chance)
        chosen = allowed & (draws[0] < MASKED)
        as_mask = chosen & (draws[1] < REPLACED)
        other = chosen & ~as_mask & (draws[2] < KEPT)
        words = torch.randint(len(self.tokenizer), ids.shape, generator=chance)
        found = ids.masked_fill(as_mask, self.tokenizer.mask_token_id)
        return torch.where(other, words, found), ids.masked_fill(~chosen, IGNORED)


class Seq2Seq(Task):
    name = "seq2seq-lm"
    auto_class = "AutoModelForSeq2SeqLM"
    endings = ("ForConditionalGeneration",)
    predicts = "texts that answer a text"
    needs = "a text and what is to be written for it (source, target)"
    features = Features({"text": Value("string"), "target": Value("string")})

    def find(self, columns, source, options):
        given = {"text": options.text_column, "target": options.label_column}
        return find_columns(self, {"text": SOURCES, "target": TARGETS}, given, columns, source)

    def row(self, given, columns):
        found = {usual: given[own] for usual, own in columns.items()}
        return found if all(isinstance(text, str) and text.strip() for text in found.values()) else None

    def texts(self, row):
        return iter((row["text"], row["target"]))

    def encode(self, texts, tokenizer, config, *, max_length, unlabelled, measured):
        def encode(rows):
            encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
            written = tokenizer(text_target=rows["target"], truncation=True, max_length=max_length)["input_ids"]
            return {**encoded, "labels": written, "target": rows["target"]}

        columns = [name for name in texts.splits["train"].column_names if name != "target"]
        encoded = texts.splits.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")
        return encoded if measured else for_training(encoded, ["target"])
