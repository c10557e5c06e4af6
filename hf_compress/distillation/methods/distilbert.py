"""DistilBERT: soft targets, the student's own loss and the direction of the last hidden states, all three at once.

Sanh et al., 2019, https://arxiv.org/abs/1910.01108

    5 * soft loss + 2 * masked-language-model loss + 1 * (1 - cos(H_s, H_t))

is written here with a seventh of these weights, so that alpha stays the share of the soft loss:

    loss = (1 - alpha) * task loss + alpha * soft loss + cosine_weight * cosine loss,   alpha = 5/7, cosine_weight = 1/7

With labels of a task instead of masked tokens it is the same loss. H are the last hidden states of all real tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.training.state import TrainingState


@dataclass
class LastStateOptions(TermOptions):
    cosine_weight: float = field(default=1 / 7, metadata={"help": "Weight of the cosine loss; 0 leaves it out."})

    def __post_init__(self):
        super().__post_init__()
        if self.cosine_weight < 0:
            raise ValueError(f"cosine_weight must be 0 or more, got {self.cosine_weight}.")


@dataclass
class DistilBertConfig(LastStateOptions, DistillationConfig):
    alpha: float = field(
        default=5 / 7,
        metadata={"help": "Share of the soft loss, 0 to 1; the task loss gets the rest. 1 needs no labels."},
    )


def cosine_loss(student_states: Tensor, teacher_states: Tensor, weights: Tensor) -> Tensor:
    """1 - cosine of hidden states (B, T, D), summed over tokens by `weights` (B, T), 0 for padding."""
    cosine = F.cosine_similarity(exact(student_states), exact(teacher_states), dim=-1)  # (B, T)
    return ((1 - cosine) * weights).sum()


class LastStates(Term):
    """The cosine of the last hidden states, through a learned projection where widths differ.

    In an encoder-decoder the last states are the decoder's.
    """

    options_class, name = LastStateOptions, "cosine"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        self.last = num_hidden_states(student) - 1, num_hidden_states(teacher) - 1
        self.student_signals, self.teacher_signals = ({"hidden_states": [number]} for number in self.last)

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
        return {"cosine": projection(student, teacher)}

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        mine, theirs = self.last
        states = student.hidden_states[mine]
        weights, unit = self.tokens(states, inputs, mine)
        loss = cosine_loss(state.cosine(states.float()), teacher.hidden_states[theirs], weights)
        return {"cosine_loss": Loss(loss, unit, self.options.cosine_weight)}


class DistilBertTrainer(DistillationTrainer):
    """The triple loss. Widths may differ."""

    config_class = DistilBertConfig

    def own_terms(self) -> list[Term]:
        return [*super().own_terms(), *([LastStates(self.args)] if self.args.cosine_weight else [])]
