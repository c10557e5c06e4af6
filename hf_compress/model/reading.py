"""What stands between texts and a model: its tokenizer, the padding of batches, and how long a text it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # a label that does not count
LABEL_COLUMNS = ("labels", "label", "label_ids")


def open_tokenizer(source: str | Path, **options) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; `options` of `from_pretrained`. Raises ValueError for a source that has none.

    Transformers makes one that knows no word of a folder without its files: every text would be unknown tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source} has no tokenizer beside the model: {reason}") from error
    named = {*tokenizer.all_special_tokens, *getattr(tokenizer, "added_tokens_encoder", {})}
    if hasattr(tokenizer, "get_vocab") and set(tokenizer.get_vocab()) <= named:
        files = ", ".join(["tokenizer.json", *type(tokenizer).vocab_files_names.values()])
        raise ValueError(
            f"{source} has no tokenizer beside the model: none of the files {files} that hold its words is there. "
            "Save it into the folder with tokenizer.save_pretrained."
        )
    tokenizer.init_kwargs.pop("local_files_only", None)  # whether this machine has a network: saved with it otherwise
    return tokenizer


@dataclass(frozen=True)
class PaddingCollator:
    """Makes a batch (B, T) of rows of any length: what is added is 0 in the attention mask, and its labels are -100.

    Padding is never told by its token: many tokenizers have none of its own, and the end of a text is one to learn.

    Args:
        tokenizer: says which token pads (any will do, where it has none) and, for rows with labels, on which side.
        tokens_are_labels: for language models; padding then stands at the right, where it moves no position.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens_are_labels: bool = False

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        rows = [{"labels" if name in LABEL_COLUMNS else name: value for name, value in row.items()} for row in rows]
        if "attention_mask" not in rows[0]:
            rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": self.tokenizer.pad_token_type_id,
                "special_tokens_mask": 1, "labels": IGNORED}  # fmt: skip
        is_left = self.tokenizer.padding_side == "left" and not self.tokens_are_labels
        batch = {name: _padded([row[name] for row in rows], fill.get(name, 0), is_left) for name in rows[0]}
        if self.tokens_are_labels:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch


def _padded(values: Sequence, fill: int, is_left: bool) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if tensors[0].ndim == 0 or len({len(tensor) for tensor in tensors}) == 1:
        return torch.stack(tensors)
    side = "left" if is_left else "right"
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that the model reads; None where nothing limits it.

    RoBERTa and its kin number positions from behind the padding token's id: their tables have rows that no text uses.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2] and module.padding_idx is not None
    ]
    limits = [longest, *(table.num_embeddings - table.padding_idx - 1 for table in tables)]
    return min((limit for limit in limits if limit is not None), default=None)


def num_positions_of(config: PretrainedConfig) -> int | None:
    """`num_positions` of a model that is not loaded."""
    with torch.device("meta"):
        return num_positions(AutoModel.from_config(config))
