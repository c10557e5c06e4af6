"""Neighbours: for each example of a batch, which others are near it, as the teacher sees them.

Probabilistic transfer, Passalis and Tefas, 2018, https://arxiv.org/abs/1803.10837, eq. 3 to 9:

    k(a, b) = (cos(a, b) + 1) / 2
    p(j | i) = k(x_i, x_j) / sum over m != i of k(x_i, x_m)
    loss = probability_weight * mean over i of KL(p_t(. | i) || p_s(. | i))

Relative dissimilarity, You et al., 2017, https://doi.org/10.1145/3097983.3098135 (eq. 57 of the text survey): where the
teacher finds a nearer to i than b, so should the student, by a margin in units of its mean distance

    loss = order_weight * mean over triplets of max(0, d(i, a) - d(i, b) + margin)

x are hidden states averaged over an example's real tokens, of any widths. As with `relational`, neighbours are those of
one micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.methods.relational import Examples
from hf_compress.distillation.runs import Run
from hf_compress.distillation.terms import TermOptions
from hf_compress.training.state import TrainingState

RELATIONS_HELP = "Hidden states to compare, as pairs student:teacher such as `1:2,3:6`; the last by default."


@dataclass
class NeighbourProbabilityOptions(TermOptions):
    relations: str | None = field(default=None, metadata={"help": RELATIONS_HELP})
    probability_weight: float = field(default=1.0, metadata={"help": "Weight of the loss, above 0."})

    def __post_init__(self):
        super().__post_init__()
        if self.probability_weight <= 0:
            raise ValueError(f"probability_weight must be above 0, got {self.probability_weight}.")


@dataclass
class NeighbourOrderOptions(TermOptions):
    relations: str | None = field(default=None, metadata={"help": RELATIONS_HELP})
    order_weight: float = field(default=1.0, metadata={"help": "Weight of the loss, above 0."})
    margin: float = field(default=0.1, metadata={"help": "Of the order, in units of the student's mean distance."})

    def __post_init__(self):
        super().__post_init__()
        if self.order_weight <= 0 or self.margin < 0:
            raise ValueError(
                f"order_weight must be above 0 and margin 0 or more, got {self.order_weight} and {self.margin}."
            )


def probability_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the probabilities over the other examples, summed over the examples (B, D) and (B, D')."""
    if len(student) < 2:
        return student.sum() * 0.0
    q, p = (_probabilities(exact(x)) for x in (student, teacher))
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def _probabilities(x: Tensor) -> Tensor:
    """[i, m] is p of the m-th other example, given i: (B, B - 1)."""
    directions = F.normalize(x, dim=-1)
    kernel = ((directions @ directions.T + 1) / 2).clamp(min=1e-12)  # (B, B)
    others = kernel[~torch.eye(len(x), dtype=torch.bool, device=x.device)].view(len(x), -1)  # (B, B - 1)
    return others / others.sum(dim=-1, keepdim=True)


def order_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Hinge of the order of distances: its mean over the triplets of examples that the teacher orders, times B."""
    if len(student) < 3:
        return student.sum() * 0.0
    mine, theirs = (_distances(exact(x)) for x in (student, teacher))  # (B, B)
    mine = mine / (mine.sum() / (len(mine) * (len(mine) - 1))).clamp(min=1e-12)
    hinge = (mine[:, :, None] - mine[:, None, :] + margin).clamp(min=0)  # [i, a, b]
    is_other = ~torch.eye(len(mine), dtype=torch.bool, device=mine.device)
    is_ordered = (theirs[:, :, None] < theirs[:, None, :]) & is_other[:, :, None] & is_other[:, None, :]
    return len(mine) * (hinge * is_ordered).sum() / is_ordered.sum().clamp(min=1)


def _distances(x: Tensor) -> Tensor:
    """(B, B), with the gradient 0 where two examples are one."""
    squares = (x[:, None] - x[None]).square().sum(dim=-1)
    return torch.where(squares > 0, squares.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0.0)


class NeighbourProbabilities(Examples):
    """Which examples are neighbours, as probabilities."""

    options_class, name = NeighbourProbabilityOptions, "neighbour_probabilities"

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        sums = [probability_loss(*pair) for pair in self.pooled(student, teacher, inputs)]
        return {"probability_loss": Loss(torch.stack(sums).sum(), "example", self.options.probability_weight)}


class NeighbourOrder(Examples):
    """Which of two examples is nearer."""

    options_class, name = NeighbourOrderOptions, "neighbour_order"

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        sums = [order_loss(*pair, self.options.margin) for pair in self.pooled(student, teacher, inputs)]
        return {"order_loss": Loss(torch.stack(sums).sum(), "example", self.options.order_weight)}
