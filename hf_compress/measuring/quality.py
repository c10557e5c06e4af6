"""Scores of a model, example by example."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import default_data_collator

from hf_compress.measuring.measure import Source, evaluating, local_folder
from hf_compress.model.inputs import forward_arguments, forward_names
from hf_compress.model.reading import LABEL_COLUMNS, PaddingCollator, open_tokenizer

Metric = Callable[[object, Mapping[str, Tensor]], Tensor]


def accuracy(outputs: object, batch: Mapping[str, Tensor]) -> Tensor:
    """1 where the highest logit (B, C) is the label (B,), else 0."""
    logits, labels = outputs.logits, batch["labels"]
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"accuracy needs logits (B, C) and one whole number as label, got logits {tuple(logits.shape)} and "
            f"{labels.dtype} labels {tuple(labels.shape)}. Give a `metric` that scores each example."
        )
    return logits.argmax(-1) == labels


def token_log_likelihood(outputs: object, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean log-probability of each text's tokens given those before, (B,); its negative is the log of perplexity."""
    tokens, logits = batch["input_ids"][:, 1:], outputs.logits[:, :-1].float()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    real = (mask[:, 1:] * mask[:, :-1]).double()  # (B, T - 1): nothing is told from padding, on either side
    chosen = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # (B, T - 1)
    return (chosen * real).sum(1) / real.sum(1).clamp(min=1)


@torch.inference_mode()
def example_scores(
    model: PreTrainedModel, rows: Sequence[Mapping], collator: Callable, *, metric: Metric, batch_size: int
) -> Tensor:
    """`metric` of each row, (n,) float64. Rows of like length share a batch, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda i: _length(rows[i], model.main_input_name))
    scores = torch.empty(len(rows), dtype=torch.double)
    with evaluating([model]):
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collator([rows[i] for i in chosen]).items()}
            values = metric(model(**forward_arguments(model, batch)), batch)
            if values.shape != (len(chosen),):
                raise ValueError(
                    f"a metric returns one score for each example, ({len(chosen)},) here, got {tuple(values.shape)}."
                )
            scores[chosen] = values.double().cpu()
    return scores


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


def usable_rows(eval_dataset: Sequence[Mapping], model: PreTrainedModel, metric: Metric) -> list[dict]:
    """The columns that a model or the metric can use: what forward takes, and the labels."""
    if len(eval_dataset) == 0:
        raise ValueError("eval_dataset is empty: give at least one example, or None to compare cost alone.")
    columns = sorted(eval_dataset[0])
    if model.main_input_name not in columns:
        raise ValueError(f"eval_dataset has no column {model.main_input_name!r}, only {columns}. Tokenize it first.")
    if metric is accuracy and not set(LABEL_COLUMNS) & set(columns):
        raise ValueError(f"accuracy needs labels: a column named one of {LABEL_COLUMNS}, got only {columns}.")
    wanted = [column for column in columns if column in {*forward_names(model), *LABEL_COLUMNS}]
    return [{column: row[column] for column in wanted} for row in (eval_dataset[i] for i in range(len(eval_dataset)))]


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
    tokens = [token for row in rows for token in row["input_ids"] if token not in special]
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
