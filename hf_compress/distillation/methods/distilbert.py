"""DistilBERT: soft targets, the student's own loss and the direction of the last hidden states, all three at once.

Sanh et al., 2019, https://arxiv.org/abs/1910.01108

    5 * soft loss + 2 * masked-language-model loss + 1 * (1 - cos(H_s, H_t))

is written here with a seventh of these weights, so that alpha stays the share of the soft loss:

    loss = (1 - alpha) * task loss + alpha * soft loss + cosine_weight * cosine loss,   alpha = 5/7, cosine_weight = 1/7

With labels of a task instead of masked tokens it is the same loss. H are the last hidden states of all real tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.training.state import TrainingState


@dataclass
class DistilBertConfig(DistillationConfig):
    alpha: float = field(
        default=5 / 7,
        metadata={"help": "Share of the soft loss, 0 to 1; the task loss gets the rest. 1 needs no labels."},
    )
    cosine_weight: float = field(default=1 / 7, metadata={"help": "Weight of the cosine loss; 0 leaves it out."})

    def __post_init__(self):
        super().__post_init__()
        if self.cosine_weight < 0:
            raise ValueError(f"cosine_weight must be 0 or more, got {self.cosine_weight}.")


def cosine_loss(student_states: Tensor, teacher_states: Tensor, weights: Tensor) -> Tensor:
    """1 - cosine of hidden states (B, T, D), summed over tokens by `weights` (B, T), 0 for padding."""
    cosine = F.cosine_similarity(exact(student_states), exact(teacher_states), dim=-1)  # (B, T)
    return ((1 - cosine) * weights).sum()


class DistilBertTrainer(DistillationTrainer):
    """The triple loss. Widths may differ: the student's last states are then compared through a learned projection.

    In an encoder-decoder the last states are the decoder's.
    """

    config_class = DistilBertConfig

    def check_layers(self) -> None:
        super().check_layers()
        self.last_states = num_hidden_states(self.model) - 1, num_hidden_states(self.teacher) - 1

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = super().make_training_state(model)
        if self.args.cosine_weight:
            state.add("cosine", projection(model, self.teacher))
        return state

    def student_signals(self) -> dict[str, Iterable[int]]:
        return self._with_last_states(super().student_signals(), self.last_states[0])

    def teacher_signals(self) -> dict[str, Iterable[int]]:
        return self._with_last_states(super().teacher_signals(), self.last_states[1])

    def _with_last_states(self, signals: dict[str, Iterable[int]], last: int) -> dict[str, Iterable[int]]:
        own = {last} if self.args.cosine_weight else set()
        return {**signals, "hidden_states": sorted({*signals["hidden_states"], *own})}

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        losses = super().distillation_losses(student, teacher, inputs)
        if self.args.cosine_weight:
            mine, theirs = self.last_states
            states = student.hidden_states[mine]
            weights, unit = self.real_tokens(states, inputs, is_decoder=self.is_decoder_state(mine))
            loss = cosine_loss(self.training_state.cosine(states.float()), teacher.hidden_states[theirs], weights)
            losses["cosine_loss"] = Loss(loss, unit, self.args.cosine_weight)
        return losses
