"""TinyBERT: the student imitates embeddings, hidden states and attention scores, then predictions.

Jiao et al., 2020, https://arxiv.org/abs/1909.10351

    first phase:   MSE(E_s W_e, E_t) + sum over layers m of MSE(H_s[m] W_h, H_t[g(m)]) + MSE(A_s[m], A_t[g(m)])
    second phase:  (1 - alpha) * task loss + alpha * soft loss

A are the attention scores before softmax; W_e and W_h are learned where the widths differ, and left out where they are
equal: the student then stays in the space that its copied head reads. Unlike the released code, ours never counts
padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_compress.distillation.layer_map import check_one_stack, make_layer_map
from hf_compress.distillation.losses.sums import Loss, attention_loss, hidden_state_loss
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.two_phases import TwoPhaseConfig, TwoPhaseTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.training.state import TrainingState


@dataclass
class TinyBertOptions(TermOptions):
    layer_map: str = field(
        default="uniform",
        metadata={"help": "Teacher layer of each student layer: `uniform`, `last`, or numbers such as `2,4,6`."},
    )
    embedding_weight: float = field(default=1.0, metadata={"help": "Weight of the embedding loss."})
    hidden_state_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention loss; 0 leaves it out."})


@dataclass
class TinyBertConfig(TinyBertOptions, TwoPhaseConfig):
    alpha: float = field(default=1.0, metadata={"help": "Share of the soft loss in the second phase, 0 to 1."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits before softmax; above 0."})


class TinyBertLayers(Term):
    """Embeddings, hidden states and attention scores, layer for layer."""

    options_class, name = TinyBertOptions, "tinybert"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        check_one_stack(student, teacher, "TinyBERT")
        self.layer_map = make_layer_map(self.options.layer_map, student, teacher)
        depth = len(self.layer_map)
        self.student_signals = {"hidden_states": range(depth + 1)}
        self.teacher_signals = {"hidden_states": [0, *self.layer_map]}
        if not self.options.attention_weight:
            return
        self.student_signals["attention"] = range(depth)
        self.teacher_signals["attention"] = [number - 1 for number in self.layer_map]
        teachers_layers = anatomy(teacher).layers
        for mine, number in zip(anatomy(student).layers, self.layer_map, strict=True):
            heads = mine.attention.num_heads, teachers_layers[max(number, 1) - 1].attention.num_heads
            if heads[0] != heads[1] or number == 0:
                raise ValueError(
                    f"The attention loss compares head by head: {mine.name} of the student has {heads[0]} heads, layer "
                    f"{number} of the teacher {heads[1] if number else 0}. Give the student as many heads "
                    "(hfc.make_student(..., num_attention_heads=...)), or set attention_weight=0."
                )

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
        return {"embedding": projection(student, teacher), "hidden_state": projection(student, teacher)}

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        options = self.options
        weights, unit = self.tokens(student.hidden_states[0], inputs)

        def distance(own: int, project: nn.Module) -> Tensor:
            theirs = self.layer_map[own - 1] if own else 0
            mine = project(student.hidden_states[own].float())
            return hidden_state_loss(mine, teacher.hidden_states[theirs], weights)

        states = [distance(m, state.hidden_state) for m in range(1, len(self.layer_map) + 1)]
        losses = {
            "embedding_loss": Loss(distance(0, state.embedding), unit, options.embedding_weight),
            "hidden_state_loss": Loss(torch.stack(states).sum(), unit, options.hidden_state_weight),
        }
        if options.attention_weight:
            sums = []
            for m, number in enumerate(self.layer_map):
                mine, theirs = student.attention[m], teacher.attention[number - 1]
                allowed = mine.allowed & theirs.allowed
                sums.append(attention_loss(mine.scores, theirs.scores, allowed, weights))
            losses["attention_loss"] = Loss(torch.stack(sums).sum(), unit, options.attention_weight)
        return losses


class TinyBertTrainer(TwoPhaseTrainer):
    """Two phases in one call of `train()`, each with its own warm-up and decay of the learning rate."""

    config_class = TinyBertConfig

    def intermediate_terms(self) -> list[Term]:
        return [TinyBertLayers(self.args)]

    def check_layers(self) -> None:
        super().check_layers()
        if self.args.intermediate_share == 1:  # on plain text: neither labels nor logits are read, in evaluation too
            self.label_names, self.can_return_loss = [], True
