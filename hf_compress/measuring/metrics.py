"""The usual metrics of each task, in one table: what each example adds, and what a set of examples comes to.

F1, a correlation or a perplexity belong to a set and not to an example. So a metric keeps some numbers of each example
and is a function of those of a set: pairs of examples can be drawn again, to see what is chance.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.answers import best_answers, true_answers
from hf_compress.measuring.entities import answer_scores, are_entity_tags, entities
from hf_compress.model.reading import IGNORED

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MeanOf:
    """The mean over examples of one of the numbers that are kept."""

    column: int

    def __call__(self, kept: Tensor) -> Tensor:
        return kept[..., self.column].mean(-1)


@dataclass(frozen=True)
class Metric:
    """A metric of a set of examples, higher is better.

    name      what reports call it
    keep      keep(outputs, batch, rows) -> (B, S): the numbers of each example, NaN nowhere
    total     (..., n, S) -> (...): of n examples
    others    name -> further figures of the same numbers, (n, S) -> a number
    needs     columns of the rows that `keep` reads, besides what the model takes; "labels" under any of its names
    run       run(model, arguments) -> outputs; the forward by default
    """

    name: str
    keep: Callable[[Any, Mapping[str, Tensor], Rows], Tensor]
    total: Callable[[Tensor], Tensor] = MeanOf(0)
    others: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    needs: tuple[str, ...] = ("labels",)
    run: Callable[[PreTrainedModel, Mapping[str, Tensor]], Any] = lambda model, arguments: model(**arguments)

    def further(self, kept: Tensor) -> dict[str, float]:
        """The other figures of (seeds, n, S), the mean over seeds."""
        return {name: statistics.fmean(figure(one).item() for one in kept) for name, figure in self.others.items()}


def accuracy(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """1 where the highest logit (B, C) is the label (B,), else 0."""
    logits, labels = getattr(outputs, "logits", torch.empty(0)), batch["labels"]
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"accuracy needs logits (B, C) and one whole number as label, got logits {tuple(logits.shape)} and "
            f"{labels.dtype} labels {tuple(labels.shape)}. Give a `metric` that scores each example."
        )
    return logits.argmax(-1) == labels


def metric_of_each(score: Callable[[Any, Mapping[str, Tensor]], Tensor]) -> Metric:
    """A metric from a function that scores each example, (outputs, batch) -> (B,)."""

    def keep(outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
        scores = score(outputs, batch)
        if scores.shape != (len(rows),):
            raise ValueError(
                f"a metric returns one score for each example, ({len(rows)},) here, got {tuple(scores.shape)}."
            )
        return scores[:, None]

    return Metric(getattr(score, "__name__", "quality"), keep, needs=("labels",) if score is accuracy else ())


def f1(right: Tensor, given: Tensor, true: Tensor) -> Tensor:
    """2 right / (given + true), 0 where there is neither."""
    return 2 * right / (given + true).clamp(min=1)


def counts_f1(kept: Tensor) -> Tensor:
    """F1 of all that was counted; `kept` holds right, given and true ones."""
    return f1(*kept.sum(-2).unbind(-1))


def labels_f1(kept: Tensor) -> Tensor:
    """(..., n, 3 C) -> (..., C): F1 of each label."""
    return f1(*kept.sum(-2).unflatten(-1, (3, -1)).unbind(-2))


def classes_f1(kept: Tensor) -> Tensor:
    """Mean of the F1 of each class that is there or was given; `kept` holds whether it is right, and both."""
    given, true = kept[:, 1], kept[:, 2]
    classes = torch.cat([given, true]).unique()[:, None]
    both = ((given == classes) & (true == classes)).sum(-1).double()
    return f1(both, (given == classes).sum(-1), (true == classes).sum(-1)).mean()


def pearson(kept: Tensor) -> Tensor:
    """Correlation of what was given with what is, 0 where one of them never changes."""
    centred = kept - kept.mean(-2, keepdim=True)
    given, true = centred.unbind(-1)
    return (given * true).sum(-1) / (given.square().sum(-1) * true.square().sum(-1)).sqrt().clamp(min=1e-30)


def spearman(kept: Tensor) -> Tensor:
    """Correlation of the ranks, (n, 2) -> a number; equal values share the mean of their ranks."""
    return pearson(torch.stack([_ranks(column) for column in kept.unbind(-1)], -1))


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def per_token(kept: Tensor) -> Tensor:
    """`kept` holds a sum of log-probabilities and a number of tokens."""
    total, number = kept.sum(-2).unbind(-1)
    return total / number.clamp(min=1)


def _keep_classes(outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    return torch.stack([accuracy(outputs, batch), outputs.logits.argmax(-1), batch["labels"]], -1)


def _keep_labels(outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    given, true = outputs.logits > 0, batch["labels"] > 0.5  # the logit of probability one half is 0
    return torch.cat([given & true, given, true], -1)


def _keep_scores(outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    return torch.stack([outputs.logits.double().squeeze(-1), batch["labels"].double()], -1)


def _keep_tokens(outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    real = batch["labels"] != IGNORED
    right = (outputs.logits.argmax(-1) == batch["labels"]) & real
    return torch.stack([right.sum(-1), real.sum(-1)], -1)


def _keep_entities(names: Mapping[int, str], outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    found = []
    for given, true in zip(outputs.logits.argmax(-1).tolist(), batch["labels"].tolist(), strict=True):
        pairs = [(names[a], names[b]) for a, b in zip(given, true, strict=True) if b != IGNORED]
        given, true = (entities([pair[side] for pair in pairs]) for side in (0, 1))
        found.append([len(given & true), len(given), len(true)])
    return torch.tensor(found)


def _keep_answers(may_be_none: bool, outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    given = best_answers(outputs, batch, rows, may_be_none=may_be_none)
    return torch.tensor([answer_scores(one, true_answers(row)) for one, row in zip(given, rows, strict=True)])


def _keep_likelihood(shift: int, outputs: Any, batch: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """`shift` is 1 where a token is told from those before it."""
    mask = batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, IGNORED)
    length = outputs.logits.shape[1] - shift
    chosen, logits = labels[:, shift:], outputs.logits[:, :length].float()
    real = chosen != IGNORED
    if shift and mask is not None:  # nothing is told from padding on the left
        real &= mask[:, :-1] != 0
    log_p = logits.log_softmax(-1).gather(-1, chosen.clamp(min=0)[..., None])[..., 0].double()
    return torch.stack([(log_p * real).sum(-1), real.sum(-1)], -1)


def perplexity(kept: Tensor) -> Tensor:
    return torch.exp(-per_token(kept))


def _likelihood(shift: int) -> Metric:
    keep, needs = partial(_keep_likelihood, shift), () if shift else ("labels",)
    return Metric("log-likelihood per token", keep, per_token, {"perplexity": perplexity}, needs)


CLASSES = Metric("accuracy", _keep_classes, others={"macro F1": classes_f1})
SCORES = Metric("Pearson correlation", _keep_scores, pearson, {"Spearman correlation": spearman})


def _of_classifier(model: PreTrainedModel, rows: Rows) -> Metric:
    config = model.config
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return SCORES
    if config.problem_type != "multi_label_classification":
        return CLASSES
    others = {f"F1 of {name}": lambda kept, i=i: labels_f1(kept)[i] for i, name in config.id2label.items()}
    return Metric("macro F1", _keep_labels, lambda kept: labels_f1(kept).mean(-1), others)


def _of_reader(model: PreTrainedModel, rows: Rows) -> Metric:
    needs = ("answers", "context", "offset_mapping")
    may_be_none = any("answers" in row and not true_answers(row) for row in rows)
    return Metric("answer F1", partial(_keep_answers, may_be_none), MeanOf(1), {"exact match": MeanOf(0)}, needs)


def _of_tagger(model: PreTrainedModel, rows: Rows) -> Metric:
    names = model.config.id2label
    if are_entity_tags(list(names.values())):
        return Metric("entity F1", partial(_keep_entities, names), counts_f1)
    return Metric("token accuracy", _keep_tokens, per_token)


METRICS: dict[str, Callable[[PreTrainedModel, Rows], Metric]] = {  # how a model's class ends -> its metric
    "ForSequenceClassification": _of_classifier,
    "ForImageClassification": _of_classifier,
    "ForTokenClassification": _of_tagger,
    "ForMultipleChoice": lambda model, rows: CLASSES,
    "ForQuestionAnswering": _of_reader,
    "ForQuestionAnsweringSimple": _of_reader,
    "ForMaskedLM": lambda model, rows: _likelihood(0),
    "WithLMHeadModel": lambda model, rows: _likelihood(0),
    "ForConditionalGeneration": lambda model, rows: _likelihood(0),
    "ForCausalLM": lambda model, rows: _likelihood(1),
    "LMHeadModel": lambda model, rows: _likelihood(1),
}


def metric_for(model: PreTrainedModel, rows: Rows) -> Metric:
    """The usual metric of a model's task on these rows; accuracy for a class of model that is not known."""
    name = type(model).__name__
    return next((make(model, rows) for ending, make in METRICS.items() if name.endswith(ending)), CLASSES)
