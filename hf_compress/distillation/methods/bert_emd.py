"""BERT-EMD: every student layer may learn from every teacher layer, as the earth mover's distance assigns them.

Li et al., 2020, https://arxiv.org/abs/2010.06133

    loss = (1 - alpha) * task loss + alpha * soft loss
           + sum over i, j of f_ij MSE(H_s[i] W_h, H_t[j]) + sum over i, j of f'_ij MSE(A_s[i], A_t[j])

f and f' are the flows that move the weights of the student's layers to those of the teacher's at the least cost; A are
attention scores before softmax. Cost attention: a layer whose mass travels cheaply gets more weight,

    C_i = sum over j of f_ij d_ij / w_i,    w_i = softmax over i of (sum over k of C_k / C_i) / weight_temperature

averaged over hidden states and attention. The paper solves for the flow of each batch. Here flow and weights follow
from the costs of a whole optimiser step and hold for the next one, so that all micro-batches and processes share them;
the first step moves mass from every layer to every layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import check_one_stack
from hf_compress.distillation.losses.sums import Loss, attention_loss, hidden_state_loss
from hf_compress.distillation.losses.transport import optimal_flow
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.training.state import TrainingState

CHEAPEST = 0.01  # of all layers' cost: one below it, say 0, weighs no more than at it


@dataclass
class TransportOptions(TermOptions):
    hidden_state_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention loss; 0 leaves it out."})
    weight_temperature: float = field(
        default=10.0, metadata={"help": "How evenly layers weigh, above 0: high for even, low for the cheapest layers."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.weight_temperature <= 0:
            raise ValueError(f"weight_temperature must be above 0, got {self.weight_temperature}.")


@dataclass
class BertEmdConfig(TransportOptions, DistillationConfig):
    """The settings of the trainer and of its term."""


def cost_attention(costs: Tensor, flow: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """New weights (M,) of the layers that the rows of `costs` and `flow` (M, L) stand for."""
    C = (flow * costs).sum(dim=1) / weights  # (M,)
    total = C.sum()
    if total == 0:
        return weights
    return (total / C.clamp(min=CHEAPEST * total) / temperature).softmax(dim=0)


class LayerTransport(Term):
    """All inner layers of both models; widths may differ, numbers of layers too.

    `trainer.training_state.hidden_state_flow` and `.attention_flow` (M, L) tell which layer learned from which.
    """

    options_class, name = TransportOptions, "bert_emd"

    def __init__(self, options: TransportOptions | None = None, **given):
        super().__init__(options, **given)
        self._costs: dict[str, Tensor] = {}  # of the running optimiser step, summed over tokens

    @property
    def compared(self) -> list[str]:
        return ["hidden_state", "attention"] if self.options.attention_weight else ["hidden_state"]

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        check_one_stack(student, teacher, "BERT-EMD")
        layers = anatomy(student).layers, anatomy(teacher).layers
        self.depths = len(layers[0]), len(layers[1])
        self.student_signals, self.teacher_signals = map(self._all_layers, self.depths)
        if not self.options.attention_weight:
            return
        heads = tuple({layer.attention.num_heads for layer in own} for own in layers)
        if heads[0] != heads[1] or len(heads[0]) > 1:
            raise ValueError(
                f"The attention loss compares every two layers head by head: the student's layers have "
                f"{sorted(heads[0])} heads, the teacher's {sorted(heads[1])}. Give the student as many "
                "(hfc.make_student(..., num_attention_heads=...)), or set attention_weight=0."
            )

    def _all_layers(self, depth: int) -> dict[str, range]:
        return {"hidden_states": range(1, depth + 1), "attention": range(depth if "attention" in self.compared else 0)}

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module | Tensor]:
        M, L = self.depths
        return {
            "transport": projection(student, teacher),
            "student_weights": torch.full((M,), 1 / M),
            "teacher_weights": torch.full((L,), 1 / L),
            **{f"{name}_flow": torch.full((M, L), 1 / (M * L)) for name in self.compared},
        }

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        weights, unit = self.tokens(student.hidden_states[1], inputs)
        projected = [state.transport(student.hidden_states[i + 1].float()) for i in range(self.depths[0])]
        own = student.attention, teacher.attention
        scores = [{i: of.scores for i, of in run.items()} for run in own] if self.options.attention_weight else []

        def hidden_state_cost(i: int, j: int) -> Tensor:
            return hidden_state_loss(projected[i], teacher.hidden_states[j + 1], weights)

        def attention_cost(i: int, j: int) -> Tensor:
            allowed = student.attention[i].allowed & teacher.attention[j].allowed
            return attention_loss(scores[0][i], scores[1][j], allowed, weights)

        costs = {"hidden_state": hidden_state_cost, "attention": attention_cost}
        return {
            f"{name}_loss": Loss(
                self.transport_loss(name, costs[name], state), unit, getattr(self.options, f"{name}_weight")
            )
            for name in self.compared
        }

    def transport_loss(self, name: str, cost: Callable[[int, int], Tensor], state: TrainingState) -> Tensor:
        """What the flow of `name` costs; in training also remembers the costs of all pairs, for the next flow."""
        flow = getattr(state, f"{name}_flow").tolist()
        is_training, terms, seen = torch.is_grad_enabled(), [], []
        for i, j in [(i, j) for i in range(self.depths[0]) for j in range(self.depths[1])]:
            if flow[i][j] > 0:
                value = cost(i, j)
                terms.append(flow[i][j] * value)
            elif is_training:
                with torch.no_grad():
                    value = cost(i, j)
            if is_training:
                seen.append(value.detach())
        if is_training:
            self._costs[name] = self._costs.get(name, 0.0) + torch.stack(seen).view(self.depths)
        return torch.stack(terms).sum()

    def after_step(self, state: TrainingState, accelerator: Accelerator) -> None:
        """New flows and layer weights from the costs of the optimiser step that just ended."""
        new = []
        for name, own in self._costs.items():
            costs = accelerator.reduce(own, reduction="sum").double().cpu()
            weights = [getattr(state, f"{who}_weights").double().cpu() for who in ("student", "teacher")]
            weights = [w / w.sum() for w in weights]
            flow = optimal_flow(costs, *weights)
            getattr(state, f"{name}_flow").copy_(flow)
            tau = self.options.weight_temperature
            new.append((cost_attention(costs, flow, weights[0], tau), cost_attention(costs.T, flow.T, weights[1], tau)))
        for who, values in zip(("student", "teacher"), zip(*new, strict=True), strict=True):
            getattr(state, f"{who}_weights").copy_(torch.stack(values).mean(dim=0))
        self._costs = {}


class BertEmdTrainer(DistillationTrainer):
    """Predictions and all inner layers at once."""

    config_class = BertEmdConfig

    def own_terms(self) -> list[Term]:
        return [*super().own_terms(), LayerTransport(self.args)]
