"""Calibration data in whatever form it comes, as batches of tensors: the same text gives the same batches.

Rows, batches of a `DataLoader`, what a tokenizer returned, arrays and plain texts are first taken apart into rows
without padding. Labels go, but for an encoder-decoder, whose decoder reads them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import has_length

from hf_compress.model.anatomy import input_embeddings
from hf_compress.model.inputs import forward_names
from hf_compress.model.reading import num_positions

logger = logging.getLogger(__name__)

MOST_TOKENS = 512  # of a text that is tokenized here
ROW_DIMS = {"pixel_values": 3}  # dimensions of one example, where it is not a line of tokens
IGNORED = -100  # the label of what no loss counts

MOST_ROWS = 256  # of a stream, which may have no end

Row = dict[str, Tensor]


def calibration_batches(
    calibration: Iterable,
    model: PreTrainedModel,
    *,
    batch_size: int = 8,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Row]:
    """Batches of at most `batch_size` rows, padded on the right under an attention mask where lengths differ.

    calibration  a dataset or list of rows, batches of any size and padding, a tokenizer's output, lists or arrays of
                 token ids, or texts, which need `tokenizer` (at most 512 tokens of each are taken). Of an
                 `IterableDataset` 256 rows are read and no more: `list(stream.take(n))` is for other numbers.

    Raises ValueError for data that is empty, lacks the model's inputs, holds no token, or holds tokens that the model's
    vocabulary does not have.
    """
    names = _wanted(model)
    found = _rows(calibration, model, names, tokenizer)
    if is_stream(calibration):
        logger.warning("Of the stream the first %d rows are read; pass list(stream.take(n)) for others.", MOST_ROWS)
        found = islice(found, MOST_ROWS)
    rows = [_without_padding(row, model) for row in found]
    if not rows:
        raise ValueError("calibration is empty: pass a dataset with `input_ids`, or batches of tensors.")
    main = model.main_input_name
    if main == "input_ids":
        _check_tokens(rows, model)
    # without a mask the model would take padding for text
    runs = [rows] if "attention_mask" in names else [list(run) for _, run in groupby(rows, lambda row: row[main].shape)]
    return [_collate(run[i : i + batch_size], model) for run in runs for i in range(0, len(run), batch_size)]


def is_stream(data: object) -> bool:
    """Whether `data` is an `IterableDataset` that does not say where it ends."""
    return isinstance(data, IterableDataset) and not has_length(data)


def first_batches(dataloader: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """All batches; of a stream, or a data loader over one, those that have the first 256 examples."""
    rows, most = 0, MOST_ROWS if is_stream(getattr(dataloader, "dataset", dataloader)) else None
    for batch in dataloader:
        _check_batch(batch)
        yield batch
        rows += len(next(iter(batch.values())))
        if most is not None and rows >= most:
            logger.warning("Of the stream the first %d examples are read; pass batches of others in a list.", rows)
            return


def _check_batch(batch: object) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    tensors = [value for value in batch.values() if isinstance(value, Tensor)] if isinstance(batch, Mapping) else []
    if not tensors or (ids is not None and getattr(ids, "ndim", 1) < 2):
        raise ValueError(
            f"The data gave a {type(batch).__name__} that is no batch of tensors, as a single row is none. Pass a "
            "loader: DataLoader(rows, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer))."
        )


def _wanted(model: PreTrainedModel) -> set[str]:
    names = {name for name in forward_names(model) if "label" not in name}
    return names - {"start_positions", "end_positions"}


def _rows(
    calibration: Iterable, model: PreTrainedModel, names: set[str], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Row]:
    main = model.main_input_name
    row_dims = ROW_DIMS.get(main, 1) + type(model).__name__.endswith("MultipleChoice")
    is_whole = isinstance(calibration, (Mapping, str)) or getattr(calibration, "ndim", 0) > 1
    for entry in [calibration] if is_whole else calibration:
        if isinstance(entry, Mapping) and main not in entry and tokenizer is not None:
            entry = entry.get("text", entry)
        if isinstance(entry, str):
            entry = _tokenized(entry, model, tokenizer)
        elif not isinstance(entry, Mapping):
            entry = {main: entry}
        if main not in entry:
            raise ValueError(
                f"calibration rows must hold `{main}`, got {sorted(entry)}. Tokenize the text first, "
                "e.g. `dataset.map(lambda row: tokenizer(row['text'], truncation=True, max_length=512))`, or pass "
                "`tokenizer`."
            )
        kept = {name: entry[name] for name in entry if name in names or (name == "labels" and _reads_labels(model))}
        if _dims(kept[main]) == 0:
            raise ValueError(f"calibration: {main} must hold the numbers of a row, got {kept[main]!r:.80}.")
        if _dims(kept[main]) <= row_dims:
            yield {name: tensor for name, value in kept.items() if (tensor := _tensor(value, name)) is not None}
            continue
        for i in range(len(kept[main])):
            parts = {name: value[i if len(value) > 1 else 0] for name, value in kept.items() if _dims(value)}
            yield {name: tensor for name, value in parts.items() if (tensor := _tensor(value, name)) is not None}


def _tokenized(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Mapping:
    if tokenizer is None:
        raise ValueError("calibration holds texts: pass the model's tokenizer as `tokenizer`, or tokenize them first.")
    longest = min(MOST_TOKENS, num_positions(model) or MOST_TOKENS, tokenizer.model_max_length)
    return tokenizer(text, truncation=True, max_length=longest)


def _dims(value: object) -> int:
    """Dimensions of a tensor, an array or nested lists, whose lengths may differ."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim
    if isinstance(value, Sequence) and not isinstance(value, str):
        return 1 + max((_dims(part) for part in value), default=0)
    return 0


def _tensor(value: object, name: str) -> Tensor | None:
    """A tensor of numbers; None for what is no number."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value)
    if isinstance(value, (bool, int, float, Sequence)) and not isinstance(value, str):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"calibration: {name} must hold numbers in rows of one length, got {value!r:.80}."
            ) from error
    return None


def _reads_labels(model: PreTrainedModel) -> bool:
    """Whether the labels are the text of a decoder."""
    return model.config.is_encoder_decoder and hasattr(model, "prepare_decoder_input_ids_from_labels")


def _without_padding(row: Row, model: PreTrainedModel) -> Row:
    """A row of text from its first real token to its last, so that it is the same however it was padded."""
    if model.main_input_name != "input_ids":
        return row
    row["input_ids"] = row["input_ids"].long()
    labels = row.pop("labels", None)
    if labels is not None:
        labels = labels[: _end(labels != IGNORED)]
        row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels[None])[0]
        row.pop("decoder_attention_mask", None)
    elif _reads_labels(model) and "decoder_input_ids" not in row:
        raise ValueError(
            f"The decoder of {type(model).__name__} needs calibration text of its own: give each row `labels` or "
            "`decoder_input_ids`."
        )
    for prefix in ("", "decoder_"):
        ids = row.get(f"{prefix}input_ids")
        if ids is None or not ids.numel():
            continue
        mask = row.get(f"{prefix}attention_mask")
        if mask is not None and mask.shape != ids.shape:
            continue
        real = _real(ids, model.config.get_text_config()) if mask is None else mask != 0
        real = real.any(0) if real.ndim > 1 else real
        part = slice(int(real.int().argmax()), _end(real))
        for name in [name for name in row if name.startswith("decoder_") == bool(prefix)]:
            if row[name].shape[-1:] == ids.shape[-1:]:
                row[name] = row[name][..., part]
        if mask is not None and mask[..., part].all():
            del row[f"{prefix}attention_mask"]
    return row


def _end(real: Tensor) -> int:
    """One past the last that is true."""
    return int(real.nonzero()[-1]) + 1 if real.any() else 0


def _real(ids: Tensor, config) -> Tensor:
    """Without a mask: all but the padding tokens at the end; where text ends in the same token, one of them is text."""
    pad = getattr(config, "pad_token_id", None)
    end = ids.shape[-1]
    if pad is not None and ids.ndim == 1:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        end = min(end, max(1, _end(ids != pad) + (pad in ends)))
    return torch.arange(ids.shape[-1]) < end


def _has_position_table(model: PreTrainedModel) -> bool:
    """Whether positions are rows of a table, beyond which nothing can be read."""
    tables = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return any("position" in name or name == "wpe" for name in tables)


def _check_tokens(rows: Sequence[Row], model: PreTrainedModel) -> None:
    embeddings = input_embeddings(model)
    largest = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
    for ids in (row[name] for row in rows for name in ("input_ids", "decoder_input_ids") if name in row):
        if ids.numel() == 0:
            raise ValueError("calibration holds rows without tokens: drop empty rows before quantizing.")
        if largest is not None and (int(ids.max()) >= largest or int(ids.min()) < 0):
            raise ValueError(
                f"calibration holds token {int(ids.max())}, but the vocabulary of {type(model).__name__} has {largest} "
                "entries. Tokenize the text with this model's own tokenizer."
            )
    longest = max(row["input_ids"].shape[-1] for row in rows)
    if _has_position_table(model) and longest > (num_positions(model) or longest):
        raise ValueError(
            f"calibration holds a row of {longest} tokens, and {type(model).__name__} has {num_positions(model)} "
            f"positions. Cut the text: tokenizer(..., truncation=True, max_length={num_positions(model)})."
        )


def _collate(rows: Sequence[Row], model: PreTrainedModel) -> Row:
    batch = {}
    names = set.intersection(*(set(row) for row in rows)) | {n for row in rows for n in row if "attention_mask" in n}
    lengths = {prefix: [row[f"{prefix}input_ids"].shape[-1] for row in rows]
               for prefix in ("", "decoder_") if f"{prefix}input_ids" in names}  # fmt: skip
    for prefix, sizes in lengths.items():
        mask = f"{prefix}attention_mask"
        if len(set(sizes)) > 1 or mask in names:
            for row in rows:
                row.setdefault(mask, torch.ones_like(row[f"{prefix}input_ids"]))
            names.add(mask)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    for name in sorted(names):
        sizes = lengths.get("decoder_" if name.startswith("decoder_") else "", [])
        values = [row[name] for row in rows]
        if sizes and all(value.shape[-1:] == (size,) for value, size in zip(values, sizes, strict=True)):
            fill = pad if name.endswith("input_ids") else 0
            values = [F.pad(value, (0, max(sizes) - value.shape[-1]), value=fill) for value in values]
        if len({value.shape for value in values}) > 1:
            raise ValueError(f"calibration: {name} has rows of the shapes {sorted({tuple(v.shape) for v in values})}.")
        batch[name] = torch.stack(values)
    return batch
