"""Scores of a model, example by example."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import default_data_collator

from hf_compress.measuring.measure import Source, evaluating, local_folder
from hf_compress.measuring.metrics import Metric, metric_for, metric_of_each
from hf_compress.model.inputs import forward_arguments, forward_names
from hf_compress.model.reading import LABEL_COLUMNS, PaddingCollator, open_tokenizer
from hf_compress.training.progress import progress_bar


@torch.inference_mode()
def example_scores(
    model: PreTrainedModel, rows: Sequence[Mapping], collator: Callable, *, metric: Metric | Callable, batch_size: int
) -> Tensor:
    """What `metric` keeps of each row, (n, S) float64; of a function that scores each example, (n,).

    Rows of like length share a batch, so that little is padding.
    """
    if not isinstance(metric, Metric):
        kept = example_scores(model, rows, collator, metric=metric_of_each(metric), batch_size=batch_size)
        return kept[:, 0]
    order = sorted(range(len(rows)), key=lambda i: _length(rows[i], model.main_input_name))
    kept: Tensor | None = None
    with evaluating([model]):
        for start in progress_bar(range(0, len(rows), batch_size), desc="Answering", unit="batch"):
            chosen = order[start : start + batch_size]
            own = [rows[i] for i in chosen]
            taken = [{name: value for name, value in row.items() if _is_read(name, model)} for row in own]
            batch = {key: value.to(model.device) for key, value in collator(taken).items()}
            values = metric.keep(metric.run(model, _arguments(model, batch)), batch, own).double().cpu()
            if kept is None:
                kept = torch.empty(len(rows), values.shape[1], dtype=torch.double)
            kept[chosen] = values
    return kept


def _is_read(column: str, model: PreTrainedModel) -> bool:
    return column in LABEL_COLUMNS or column in forward_names(model)


def _arguments(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What forward takes. A model that writes reads what it should have written so far."""
    arguments = forward_arguments(model, batch)
    writes = hasattr(model, "prepare_decoder_input_ids_from_labels") and "decoder_input_ids" not in arguments
    if writes and "labels" in batch and batch["labels"].dim() == 2:
        arguments["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return arguments


def _length(row: Mapping, column: str) -> int:
    return len(row[column]) if column == "input_ids" else 0


def check_labels(models: Mapping[str, PreTrainedModel], reference: str, *, any_order: bool = False) -> None:
    """Accuracy compares label numbers, so they must mean the same to all. Labels without names are taken on trust.

    With `any_order` each model has rows of its own, which number labels as it does.
    """
    expected = models[reference].config.id2label
    for name, model in models.items():
        labels = model.config.id2label
        unnamed = any(all(str(label).startswith("LABEL_") for label in names.values()) for names in (labels, expected))
        same = set(labels.values()) == set(expected.values()) if any_order else labels == expected
        if len(labels) != len(expected) or not (same or unnamed):
            raise ValueError(
                f"{name} and {reference} do not have the same labels: {labels} and {expected}. Compare models of one "
                "task, or give a `metric` that scores each example."
            )


def usable_rows(
    eval_dataset: Sequence[Mapping], model: PreTrainedModel, metric: Metric | Callable | None = None
) -> list[dict]:
    """The columns that a model or the metric can use: what forward takes, the labels, and what the metric needs.

    Without a metric, the columns that the usual one of the model needs. Raises ValueError where one of them is missing.
    """
    if len(eval_dataset) == 0:
        raise ValueError("eval_dataset is empty: give at least one example, or None to compare cost alone.")
    columns = sorted(eval_dataset[0])
    if model.main_input_name not in columns:
        raise ValueError(f"eval_dataset has no column {model.main_input_name!r}, only {columns}. Tokenize it first.")
    metric = as_metric(metric, model, ())
    if "labels" in metric.needs and not set(LABEL_COLUMNS) & set(columns):
        raise ValueError(f"{metric.name} needs labels: a column named one of {LABEL_COLUMNS}, got only {columns}.")
    if missing := sorted(set(metric.needs) - {"labels", *columns}):
        raise ValueError(f"{metric.name} needs the columns {list(metric.needs)}: {missing} are not in {columns}.")
    wanted = [column for column in columns if _is_read(column, model) or column in metric.needs]
    return [{column: row[column] for column in wanted} for row in (eval_dataset[i] for i in range(len(eval_dataset)))]


def as_metric(metric: Metric | Callable | None, model: PreTrainedModel, rows: Sequence[Mapping]) -> Metric:
    """A metric, that of a function which scores each example, or without either the usual one of the model."""
    if metric is None:
        return metric_for(model, rows)
    return metric if isinstance(metric, Metric) else metric_of_each(metric)


def unknown_tokens(rows: Sequence[Mapping], tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, int] | None:
    """How many tokens of the rows' texts the tokenizer does not know, and how many there are, special ones left out.

    None without a tokenizer, or with one that knows every text and so has no token for what is unknown.
    """
    if tokenizer is None or tokenizer.unk_token_id is None or "input_ids" not in rows[0]:
        return None
    unknown = tokenizer.unk_token_id
    special = {getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep", "mask")}
    if unknown in special:  # GPT-2 calls the end of a text unknown as well
        return None
    several = isinstance(rows[0]["input_ids"][0], list)  # choices
    texts = (text for row in rows for text in (row["input_ids"] if several else [row["input_ids"]]))
    tokens = [token for text in texts for token in text if token not in special]
    return tokens.count(unknown), len(tokens)


def tokenizer_beside(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored with a model, None where there is none."""
    folder = local_folder(source)
    stored = folder is None or any(True for kind in ("tokenizer*", "vocab*", "*.model") for _ in folder.glob(kind))
    return open_tokenizer(source) if stored and not isinstance(source, PreTrainedModel) else None


def padding_collator(
    rows: Sequence[Mapping], processing_class: PreTrainedTokenizerBase | None, reference: Source, main_input: str
) -> Callable:
    """Pads with `processing_class`, else with the tokenizer stored beside `reference`; rows of one length need none."""
    tokenizer = processing_class or tokenizer_beside(reference)
    if tokenizer is not None:
        return PaddingCollator(tokenizer)
    if len({_length(row, main_input) for row in rows}) > 1:
        raise ValueError("the examples differ in length: give the tokenizer that pads them as `processing_class`.")
    return default_data_collator
