"""Hints: hidden states of the student imitate those of the teacher, layer for layer as they are named.

Romero et al., 2015, https://arxiv.org/abs/1412.6550

    loss = hint_weight * sum over pairs of MSE(H_s W, H_t)

W is learned where the widths differ. In an encoder-decoder the decoder's states have a loss of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_compress.distillation.layer_map import parse_pairs
from hf_compress.distillation.losses.sums import Loss, Unit, hidden_state_loss
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.training.state import TrainingState


@dataclass
class HintOptions(TermOptions):
    hints: str | None = field(
        default=None,
        metadata={
            "help": "Hidden states to learn from, as pairs student:teacher, such as `1:2,3:6`; 0 is the embedding. Or "
            "shares of the depth, `1/2:1/2,last:last`, or for all layers `skip` or `last`, as `make_student` means it."
        },
    )
    hint_weight: float = field(default=1.0, metadata={"help": "Weight of the hint losses."})


class Hints(Term):
    options_class, name = HintOptions, "hint"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        if not self.options.hints:
            raise ValueError("Hints need pairs of hidden states student:teacher, as in hints=`1:2,3:6`.")
        self.pairs = parse_pairs(self.options.hints, student, teacher)
        self.student_signals = {"hidden_states": [mine for mine, _ in self.pairs]}
        self.teacher_signals = {"hidden_states": [theirs for _, theirs in self.pairs]}

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
        return {f"hint_{mine}_{theirs}": projection(student, teacher) for mine, theirs in self.pairs}

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        sums: dict[Unit, list[Tensor]] = {}
        for mine, theirs in self.pairs:
            project = getattr(state, f"hint_{mine}_{theirs}")
            states, targets = student.hidden_states[mine], teacher.hidden_states[theirs]
            weights, unit = self.tokens(states, inputs, mine)
            sums.setdefault(unit, []).append(hidden_state_loss(project(states.float()), targets, weights))
        return {
            "decoder_hint_loss" if unit == "prediction" else "hint_loss": Loss(
                torch.stack(values).sum(), unit, self.options.hint_weight
            )
            for unit, values in sums.items()
        }
