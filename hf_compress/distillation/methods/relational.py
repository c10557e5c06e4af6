"""Relational distillation: the student keeps the distances and angles between the examples of a batch.

Park et al., 2019, https://arxiv.org/abs/1904.05068

    psi_D(i, j) = |x_i - x_j| / mu, mu the mean over all pairs
    psi_A(i, j, k) = cosine of the angle at x_j between x_i and x_k
    loss = (1 - alpha) * task loss + alpha * soft loss
           + distance_weight * mean over pairs of Huber(psi_D of the student - psi_D of the teacher)
           + angle_weight * mean over triplets of Huber(psi_A of the student - psi_A of the teacher)

x are hidden states averaged over an example's real tokens. Nothing is learned besides the student, whatever the widths.
Relations are those of one micro-batch: gradient accumulation shows fewer of them than a batch of the same size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import num_hidden_states, parse_pairs
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.training.state import TrainingState


@dataclass
class ExampleRelationOptions(TermOptions):
    relations: str | None = field(
        default=None,
        metadata={"help": "Hidden states to compare, as pairs student:teacher such as `1:2,3:6`; the last by default."},
    )
    distance_weight: float = field(default=25.0, metadata={"help": "Weight of the distance loss; 0 leaves it out."})
    angle_weight: float = field(default=50.0, metadata={"help": "Weight of the angle loss; 0 leaves it out."})

    def __post_init__(self):
        super().__post_init__()
        if min(self.distance_weight, self.angle_weight) < 0 or not self.distance_weight + self.angle_weight:
            raise ValueError(
                "distance_weight and angle_weight must be 0 or more, and one of them above 0, got "
                f"{self.distance_weight} and {self.angle_weight}."
            )


@dataclass
class RelationalConfig(ExampleRelationOptions, DistillationConfig):
    """The settings of the trainer and of its term."""


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance of the relative distances between examples (B, D): their mean over pairs, times B. Eq. 4 to 6."""
    if len(student) < 2:
        return student.sum() * 0.0
    mine, theirs = (torch.pdist(exact(x)) for x in (student, teacher))  # (B * (B - 1) / 2,)
    mine, theirs = (d / d.mean().clamp(min=1e-12) for d in (mine, theirs))
    return len(student) * F.huber_loss(mine, theirs)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance of the angles between examples (B, D): their mean over triplets, times B. Eq. 7 and 8."""
    B = len(student)
    if B < 3:
        return student.sum() * 0.0
    mine, theirs = (_cosines(exact(x)) for x in (student, teacher))
    return F.huber_loss(mine, theirs, reduction="sum") / ((B - 1) * (B - 2))


def _cosines(x: Tensor) -> Tensor:
    """[j, i, k] is the cosine of the angle at x_j between x_i and x_k, (B, B, B); no angle, but a constant, where two
    of them are one."""
    directions = F.normalize(x[None] - x[:, None], dim=-1)  # (B, B, D)
    return directions @ directions.mT


def pooled(states: Tensor, weights: Tensor) -> Tensor:
    """The mean of states (B, T, D) over tokens by `weights` (B, T), 0 for padding: (B, D)."""
    weights = weights.to(states.dtype)[..., None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-12)


class Examples(Term):
    """Base: terms that compare what lies between the examples of a batch, in pairs of hidden states."""

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        last = ":".join(str(num_hidden_states(model) - 1) for model in (student, teacher))
        self.relations = parse_pairs(self.options.relations or last, student, teacher, option="relations")
        self.student_signals = {"hidden_states": [mine for mine, _ in self.relations]}
        self.teacher_signals = {"hidden_states": [theirs for _, theirs in self.relations]}

    def pooled(self, student: Run, teacher: Run, inputs: Mapping) -> list[tuple[Tensor, Tensor]]:
        """The states of the examples in both models, (B, D) and (B, D'), for each of the relations."""
        pairs = []
        for mine, theirs in self.relations:
            states = student.hidden_states[mine]
            weights, _ = self.tokens(states, inputs, mine)
            pairs.append((pooled(exact(states), weights), pooled(exact(teacher.hidden_states[theirs]), weights)))
        return pairs


class ExampleRelations(Examples):
    """How the examples of a batch lie to each other in the hidden states of both models."""

    options_class, name = ExampleRelationOptions, "relational"

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        pairs, losses = self.pooled(student, teacher, inputs), {}
        for name, loss in (("distance", distance_loss), ("angle", angle_loss)):
            if weight := getattr(self.options, f"{name}_weight"):
                total = torch.stack([loss(*pair) for pair in pairs]).sum()
                losses[f"{name}_loss"] = Loss(total, "example", weight)
        return losses


class RelationalTrainer(DistillationTrainer):
    """Predictions, and the relations between examples."""

    config_class = RelationalConfig

    def own_terms(self) -> list[Term]:
        return [*super().own_terms(), ExampleRelations(self.args)]
