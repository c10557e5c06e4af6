"""Several teachers: a student learns from the mean of their predictions, equal or weighted."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.model.tasks import plain_model

Kind = Literal["soft", "binary", "logits"]


class SeveralTeachers(nn.Module):
    """Two or more teachers, live or cached, as one `teacher_model`; their weights sum to 1.

    Only predictions are averaged. Layers are read from the first teacher, so that a loss on layers can be refused by
    name: it is the only one that is a submodule.
    """

    def __init__(self, teachers: Sequence[nn.Module], weights: Sequence[float] | None = None):
        super().__init__()
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"teacher_weights must give each of the {len(teachers)} teachers a share of 0 or more, not all 0: got "
                f"{weights}."
            )
        if len(teachers) < 2:
            raise ValueError(f"A list of teachers must hold two or more, got {len(teachers)}. Pass one as it is.")
        self.first, self._rest = teachers[0], tuple(teachers[1:])
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def all(self) -> tuple[nn.Module, ...]:
        return self.first, *self._rest

    def get_base_model(self) -> nn.Module:
        return plain_model(self.first)

    def _apply(self, fn: Callable, recurse: bool = True) -> "SeveralTeachers":
        for teacher in self.all:
            teacher._apply(fn, recurse)
        return self

    def forward(self, **inputs):
        raise TypeError("Several teachers are run one by one: use `all`.")


def weigh_teachers(
    teachers: Sequence[nn.Module],
    evaluate: Callable[[nn.Module], float],
    *,
    cut_off: float = 0.95,
    weights: Sequence[float] | None = None,
) -> list[float]:
    """`teacher_weights` by what each teacher is worth: 0 below `cut_off` times the best one's score.

    Args:
        evaluate: gives a teacher's score on held-out examples, 0 or more and higher for better, as accuracy is.
        cut_off: tau, a share of the best score: above 0 and up to 1.
        weights: of those that stay; equal when not given.

    A teacher that is worse than what the student could learn from the others takes accuracy away (Tan et al., 2019,
    https://arxiv.org/abs/1902.10461, whose tau cuts distillation where the student has overtaken its teacher).
    """
    if not 0 < cut_off <= 1:
        raise ValueError(f"cut_off is a share of the best teacher's score, above 0 and up to 1, got {cut_off}.")
    weights = [1.0] * len(teachers) if weights is None else list(weights)
    if len(weights) != len(teachers):
        raise ValueError(f"There are {len(teachers)} teachers and {len(weights)} weights.")
    scores = [float(evaluate(teacher)) for teacher in teachers]
    if not all(score >= 0 for score in scores) or max(scores) == 0:  # nan is refused, too
        raise ValueError(
            f"Scores must be 0 or more, and one above 0, for a share of the best to mean something: {scores}."
        )
    return [weight if score >= cut_off * max(scores) else 0.0 for weight, score in zip(weights, scores, strict=True)]


def teachers_of(teacher: nn.Module) -> tuple[nn.Module, ...]:
    return teacher.all if isinstance(teacher, SeveralTeachers) else (teacher,)


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float], *, temperature: float, kind: Kind) -> Tensor:
    """Logits (..., C) whose probabilities at `temperature` are the weighted mean of the teachers'.

    kind: `soft` for probabilities by softmax, `binary` for one by sigmoid for each class, `logits` for the mean of the
    logits themselves. Teachers whose vocabularies are padded differently are cut to the smallest.
    """
    classes = min(z.shape[-1] for z in logits)
    z = torch.stack([z[..., :classes].float() for z in logits])  # (teachers, ..., C)
    shares = z.new_tensor(weights).view(-1, *[1] * (z.dim() - 1))
    if kind == "logits":
        return (shares * z).sum(dim=0)
    z, log_shares = z / temperature, shares.log()
    if kind == "soft":
        return temperature * (log_shares + F.log_softmax(z, dim=-1)).logsumexp(dim=0)
    yes, no = (log_shares + F.logsigmoid(z)).logsumexp(dim=0), (log_shares + F.logsigmoid(-z)).logsumexp(dim=0)
    return temperature * (yes - no)
