"""Phases of one training: in each other losses, with a warm-up and a decay of the learning rate of its own.

phases=[
    hfc.Phase(0.7, [hfc.TinyBertLayers()], predictions=False),
    hfc.Phase(0.3, [hfc.Flows()], learning_rate=1e-5),
]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_compress.distillation.terms import Term


@dataclass
class Phase:
    """A share of the steps, and what is learned in them.

    predictions    whether the task loss and the soft loss belong to it, besides its terms
    learning_rate  at its start; that of the config when not given
    """

    share: float
    terms: Sequence[Term] = ()
    predictions: bool = True
    learning_rate: float | None = None


def used(phases: Sequence[Phase]) -> list[Phase]:
    """The phases that have steps. Raises ValueError for shares that are not those of a whole, or a phase of nothing."""
    shares = [phase.share for phase in phases]
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"The shares of the phases must be 0 or more and sum to 1, got {shares}.")
    for phase in phases:
        if phase.share and not (phase.predictions or phase.terms):
            raise ValueError("A phase without terms and without predictions would learn nothing.")
    return [phase for phase in phases if phase.share]


class Phased(Trainer):
    """For trainers with `self.phases`, those that have steps."""

    phases: Sequence[Phase]

    def starts(self, num_steps: int) -> list[int]:
        """The step at which each phase starts, and the end of the last."""
        return [0, *(round(share * num_steps) for share in accumulate(p.share for p in self.phases[:-1])), num_steps]

    @property
    def phase(self) -> Phase:
        """That of this step, or of an evaluation after it; before training it is the first."""
        if not self.state.max_steps:
            return self.phases[0]
        ends = self.starts(self.state.max_steps)[1:-1]
        return self.phases[sum(self.state.global_step >= end for end in ends)]

    def is_complete(self) -> bool:
        """The losses of two phases are no measure for each other: only what the last one has trained competes."""
        is_last = len(self.phases) == 1 or self.state.global_step > self.starts(self.state.max_steps)[-2]
        return is_last and super().is_complete()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Linear warm-up and decay, once for each phase; another `lr_scheduler_type` spans all of them as usual."""
        has_own = len(self.phases) > 1 or self.phases[0].learning_rate is not None
        if self.lr_scheduler is None and has_own and self.args.lr_scheduler_type == "linear":
            usual = self.args.learning_rate
            spans = list(pairwise(self.starts(num_training_steps)))

            def factor(step: int) -> float:
                number = min(sum(step >= end for _, end in spans), len(spans) - 1)
                (start, end), own = spans[number], self.phases[number].learning_rate
                ratio = 1.0 if own is None else own / usual if usual else 0.0
                return ratio * _warm_up_and_decay(step - start, end - start, self.args.get_warmup_steps(end - start))

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


def _warm_up_and_decay(step: int, num_steps: int, num_warm_up_steps: int) -> float:
    if step < num_warm_up_steps:
        return step / max(num_warm_up_steps, 1)
    return max(0.0, (num_steps - step) / max(num_steps - num_warm_up_steps, 1))
