"""Two phases in one run: inner layers first, then predictions, each with its own warm-up and decay.

first phase, a share of the steps:   what a method computes from inner layers
second phase, the rest:              (1 - alpha) * task loss + alpha * soft loss
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.runs import Run
from hf_compress.distillation.trainer import DistillationTrainer


@dataclass
class TwoPhaseConfig(DistillationConfig):
    intermediate_share: float = field(
        default=0.7,
        metadata={"help": "Share of the steps spent on inner layers, before predictions; 0 to 1. 1 needs no labels."},
    )
    prediction_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the second phase; learning_rate when not given."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.intermediate_share <= 1:
            raise ValueError(f"intermediate_share must lie between 0 and 1, got {self.intermediate_share}.")


class TwoPhaseTrainer(DistillationTrainer):
    """The base of methods with two phases: they say what the first one captures and computes."""

    config_class = TwoPhaseConfig

    # What the methods override

    def intermediate_signals(self) -> tuple[dict[str, Iterable[int]], dict[str, Iterable[int]]]:
        """Which `attention` and `hidden_states` the first phase captures, of the student and of the teacher."""
        raise NotImplementedError

    def intermediate_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        raise NotImplementedError

    # The two phases

    @property
    def is_intermediate(self) -> bool:
        """Whether this step, or an evaluation after it, belongs to the first phase; so it does before training."""
        share = self.args.intermediate_share
        if share in (0, 1) or not self.state.max_steps:
            return share > 0
        return self.state.global_step < round(share * self.state.max_steps)

    def is_complete(self) -> bool:
        """The losses of the two phases are no measure for each other: only what the last one has trained competes."""
        share = self.args.intermediate_share
        is_last = share in (0, 1) or self.state.global_step > round(share * self.state.max_steps)
        return is_last and super().is_complete()

    def student_signals(self) -> dict[str, Iterable[int]]:
        return self.intermediate_signals()[0] if self.is_intermediate else super().student_signals()

    def teacher_signals(self) -> dict[str, Iterable[int]]:
        return self.intermediate_signals()[1] if self.is_intermediate else super().teacher_signals()

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        if self.is_intermediate:
            return self.intermediate_losses(student, teacher, inputs)
        return super().distillation_losses(student, teacher, inputs)

    @property
    def needs_labels(self) -> bool:
        """The losses of the first phase need none, so plain text is evaluated by them as well."""
        return not self.is_intermediate and super().needs_labels

    @property
    def needs_logits(self) -> bool:
        return self.args.intermediate_share < 1 and super().needs_logits

    @property
    def reads_logits(self) -> bool:
        return not self.is_intermediate and super().reads_logits

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Linear warm-up and decay, once for each phase; another `lr_scheduler_type` spans both phases as usual."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type == "linear":
            first = round(self.args.intermediate_share * num_training_steps)
            second_rate = self.args.prediction_learning_rate or self.args.learning_rate
            ratio = second_rate / self.args.learning_rate if self.args.learning_rate else 0.0

            def factor(step: int) -> float:
                if step < first:
                    return _warm_up_and_decay(step, first, self.args.get_warmup_steps(first))
                rest = num_training_steps - first
                return ratio * _warm_up_and_decay(step - first, rest, self.args.get_warmup_steps(rest))

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


def _warm_up_and_decay(step: int, num_steps: int, num_warm_up_steps: int) -> float:
    if step < num_warm_up_steps:
        return step / max(num_warm_up_steps, 1)
    return max(0.0, (num_steps - step) / max(num_steps - num_warm_up_steps, 1))
