"""Two phases in one run: inner layers first, then predictions.

first phase, a share of the steps:   the terms of a method
second phase, the rest:              (1 - alpha) * task loss + alpha * soft loss
"""

from dataclasses import dataclass, field

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.phases import Phase
from hf_compress.distillation.terms import Term
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
    """The base of methods with two phases: `intermediate_terms` are those of the first."""

    config_class = TwoPhaseConfig

    def intermediate_terms(self) -> list[Term]:
        raise NotImplementedError

    def make_phases(self) -> list[Phase]:
        share, rate = self.args.intermediate_share, self.args.prediction_learning_rate
        return [
            Phase(share, self.intermediate_terms(), predictions=False),
            Phase(1 - share, self.own_terms(), learning_rate=rate),
        ]
