"""TinyBERT: the student imitates embeddings, hidden states and attention scores, then predictions.

Jiao et al., 2020, https://arxiv.org/abs/1909.10351

    first phase:   MSE(E_s W_e, E_t) + sum over layers m of MSE(H_s[m] W_h, H_t[g(m)]) + MSE(A_s[m], A_t[g(m)])
    second phase:  (1 - alpha) * task loss + alpha * soft loss

A are the attention scores before softmax; W_e and W_h are learned where the widths differ, and left out where they are
equal: the student then stays in the space that its copied head reads. Unlike the released code, ours never counts
padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from hf_compress.distillation.layer_map import check_one_stack, make_layer_map
from hf_compress.distillation.losses.sums import Loss, attention_loss, hidden_state_loss
from hf_compress.distillation.phases import TwoPhaseConfig, TwoPhaseTrainer
from hf_compress.distillation.runs import Run, projection
from hf_compress.model.anatomy import anatomy
from hf_compress.training.state import TrainingState


@dataclass
class TinyBertConfig(TwoPhaseConfig):
    alpha: float = field(default=1.0, metadata={"help": "Share of the soft loss in the second phase, 0 to 1."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits before softmax; above 0."})
    layer_map: str = field(
        default="uniform",
        metadata={"help": "Teacher layer of each student layer: `uniform`, `last`, or numbers such as `2,4,6`."},
    )
    embedding_weight: float = field(default=1.0, metadata={"help": "Weight of the embedding loss."})
    hidden_state_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention loss; 0 leaves it out."})


class TinyBertTrainer(TwoPhaseTrainer):
    """Two phases in one call of `train()`, each with its own warm-up and decay of the learning rate."""

    config_class = TinyBertConfig

    def check_layers(self) -> None:
        super().check_layers()
        if self.args.intermediate_share == 1:  # on plain text: neither labels nor logits are read, in evaluation too
            self.label_names, self.can_return_loss = [], True
        check_one_stack(self.model, self.teacher, type(self).__name__)
        student, teacher = anatomy(self.model), anatomy(self.teacher)
        self.layer_map = make_layer_map(self.args.layer_map, self.model, self.teacher)
        if not self.args.attention_weight:
            return
        for mine, number in zip(student.layers, self.layer_map, strict=True):
            heads = mine.attention.num_heads, teacher.layers[max(number, 1) - 1].attention.num_heads
            if heads[0] != heads[1] or number == 0:
                raise ValueError(
                    f"The attention loss compares head by head: {mine.name} of the student has {heads[0]} heads, layer "
                    f"{number} of the teacher {heads[1] if number else 0}. Give the student as many heads "
                    "(hfc.make_student(..., num_attention_heads=...)), or set attention_weight=0."
                )

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = super().make_training_state(model)
        state.add("embedding", projection(model, self.teacher))
        state.add("hidden_state", projection(model, self.teacher))
        return state

    def intermediate_signals(self) -> tuple[dict[str, Iterable[int]], dict[str, Iterable[int]]]:
        has_attention = bool(self.args.attention_weight)
        depth, teacher_layers = len(self.layer_map), [number - 1 for number in self.layer_map]
        return (
            {"attention": range(depth) if has_attention else (), "hidden_states": range(depth + 1)},
            {"attention": teacher_layers if has_attention else (), "hidden_states": [0, *self.layer_map]},
        )

    def intermediate_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        args = self.args
        weights, unit = self.real_tokens(student.hidden_states[0], inputs)

        def distance(state: int, project: torch.nn.Linear) -> torch.Tensor:
            number = self.layer_map[state - 1] if state else 0
            return hidden_state_loss(
                project(student.hidden_states[state].float()), teacher.hidden_states[number], weights
            )

        states = [distance(m, self.training_state.hidden_state) for m in range(1, len(self.layer_map) + 1)]
        losses = {
            "embedding_loss": Loss(distance(0, self.training_state.embedding), unit, args.embedding_weight),
            "hidden_state_loss": Loss(torch.stack(states).sum(), unit, args.hidden_state_weight),
        }
        if args.attention_weight:
            sums = []
            for m, number in enumerate(self.layer_map):
                mine, theirs = student.attention[m], teacher.attention[number - 1]
                allowed = mine.allowed & theirs.allowed
                sums.append(attention_loss(mine.scores, theirs.scores, allowed, weights))
            losses["attention_loss"] = Loss(torch.stack(sums).sum(), unit, args.attention_weight)
        return losses
