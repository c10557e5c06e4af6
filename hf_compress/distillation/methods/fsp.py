"""FSP: the student imitates how the teacher's features change from one layer to another.

Yim et al., 2017, https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    G = F_a^T F_b / T (eq. 1)
    loss = (1 - alpha) * task loss + alpha * soft loss + fsp_weight * sum over flows of MSE(G_s, G_t)

F_a, F_b (T, D) are hidden states of one model at the two ends of a flow, over the T real tokens of an example. Where
widths differ, the student's states go through a learned projection first. The paper trains on G alone, then on labels;
here both are learned at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import check_one_stack, check_range, num_layers, uniform
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.training.state import TrainingState

Flow = tuple[int, int]  # from one hidden state of a model to another


@dataclass
class FlowOptions(TermOptions):
    flows: str | None = field(
        default=None,
        metadata={
            "help": "Flows to imitate, student:teacher, each from one hidden state to another, such as "
            "`0-1:0-2,1-2:2-4`; by default through every student layer and as many parts of the teacher."
        },
    )
    fsp_weight: float = field(default=1.0, metadata={"help": "Weight of the FSP loss, 0 or more."})

    def __post_init__(self):
        super().__post_init__()
        if self.fsp_weight < 0:
            raise ValueError(f"fsp_weight must be 0 or more, got {self.fsp_weight}.")


@dataclass
class FSPConfig(FlowOptions, DistillationConfig):
    """The settings of the trainer and of its term."""


def fsp_matrix(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """G = F_a^T F_b / T of states (B, T, D), (B, D, D); `weights` (B, T) are 0 for padding."""
    weights = weights.to(start.dtype)
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)  # 1 / T for real tokens
    padding = (weights == 0)[..., None]
    return (start * shares[..., None]).masked_fill(padding, 0.0).mT @ end.masked_fill(padding, 0.0)


def fsp_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """Squared distance of the FSP matrices of two pairs of states (B, T, D), averaged over D * D, summed over B."""
    mine, theirs = (fsp_matrix(exact(a), exact(b), weights) for a, b in (student, teacher))
    return (mine - theirs).square().mean(dim=(1, 2)).sum()


def parse_flows(flows: str | None, student_layers: int, teacher_layers: int) -> list[tuple[Flow, Flow]]:
    """Read flows such as `0-1:0-2`, the student's before the teacher's. Raises ValueError for one that is not there."""
    if flows is None:
        if student_layers > teacher_layers:
            raise ValueError(
                f"Flows through every layer need a student no deeper than its teacher: it has {student_layers} layers, "
                f"the teacher {teacher_layers}. Name them, as in flows=`0-2:0-1`."
            )
        ends = [0, *uniform(student_layers, teacher_layers)]
        return [((m - 1, m), (ends[m - 1], ends[m])) for m in range(1, student_layers + 1)]
    try:
        parsed = [
            tuple(tuple(int(n) for n in side.split("-")) for side in flow.split(":")) for flow in flows.split(",")
        ]
        parsed = [((a, b), (c, d)) for (a, b), (c, d) in parsed]
    except ValueError:
        raise ValueError(
            f"flows are pairs student:teacher, each from one hidden state to another, as in `0-1:0-2,1-2:2-4`, got "
            f"{flows!r}."
        ) from None
    for mine, theirs in parsed:
        check_range(mine, student_layers, "flow", "student")
        check_range(theirs, teacher_layers, "flow", "teacher")
    return parsed


class Flows(Term):
    """The FSP loss: how features change from one layer to another."""

    options_class, name = FlowOptions, "fsp"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        check_one_stack(student, teacher, "FSP")
        self.flows = parse_flows(self.options.flows, num_layers(student), num_layers(teacher))
        self.student_signals = {"hidden_states": [state for mine, _ in self.flows for state in mine]}
        self.teacher_signals = {"hidden_states": [state for _, theirs in self.flows for state in theirs]}

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
        return {"flow": projection(student, teacher)}

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        wanted = set(self.student_signals["hidden_states"])
        projected = {n: state.flow(student.hidden_states[n].float()) for n in wanted}
        weights, _ = self.tokens(next(iter(projected.values())), inputs)
        sums = []
        for (a, b), (c, d) in self.flows:
            theirs = teacher.hidden_states[c], teacher.hidden_states[d]
            sums.append(fsp_loss((projected[a], projected[b]), theirs, weights))
        return {"fsp_loss": Loss(torch.stack(sums).sum(), "example", self.options.fsp_weight)}


class FSPTrainer(DistillationTrainer):
    """Predictions, and the flow between layers."""

    config_class = FSPConfig

    def own_terms(self) -> list[Term]:
        return [*super().own_terms(), Flows(self.args)]
