"""TinyBERT: the student imitates embeddings, hidden states and attention scores, then predictions.

Jiao et al., 2020, https://arxiv.org/abs/1909.10351

    first phase:   MSE(E_s W_e, E_t) + sum over layers m of MSE(H_s[m] W_h, H_t[g(m)]) + MSE(A_s[m], A_t[g(m)])
    second phase:  (1 - alpha) * task loss + alpha * soft loss

A are the attention scores before softmax; W_e and W_h are learned where the widths differ, and left out where they are
equal: the student then stays in the space that its copied head reads. Unlike the released code, ours never counts
padding.
"""

from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from hf_compress.anatomy import anatomy
from hf_compress.distillation.layer_map import make_layer_map
from hf_compress.distillation.losses import Loss, attention_loss, hidden_state_loss
from hf_compress.distillation.tasks import plain_model
from hf_compress.distillation.trainer import DistillationConfig, DistillationTrainer, Run, projection
from hf_compress.training_state import TrainingState


@dataclass
class TinyBertConfig(DistillationConfig):
    alpha: float = field(default=1.0, metadata={"help": "Share of the soft loss in the second phase, 0 to 1."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits before softmax; above 0."})
    layer_map: str = field(
        default="uniform",
        metadata={"help": "Teacher layer of each student layer: `uniform`, `last`, or numbers such as `2,4,6`."},
    )
    intermediate_share: float = field(
        default=0.7, metadata={"help": "Share of the steps spent on inner layers, before predictions; 0 to 1."}
    )
    prediction_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the second phase; learning_rate when not given."}
    )
    embedding_weight: float = field(default=1.0, metadata={"help": "Weight of the embedding loss."})
    hidden_state_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention loss; 0 leaves it out."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.intermediate_share <= 1:
            raise ValueError(f"intermediate_share must lie between 0 and 1, got {self.intermediate_share}.")


class TinyBertTrainer(DistillationTrainer):
    """Two phases in one call of `train()`, each with its own warm-up and decay of the learning rate."""

    config_class = TinyBertConfig

    def check_layers(self) -> None:
        super().check_layers()
        student, teacher = anatomy(self.model), anatomy(self.teacher)
        if len(student.stacks) > 1 or len(teacher.stacks) > 1:
            raise ValueError(
                f"{type(self).__name__} maps the layers of one stack, but {type(plain_model(self.model)).__name__} has "
                "an encoder and a decoder. Use DistillationTrainer, with hints for inner layers."
            )
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

    @property
    def is_intermediate(self) -> bool:
        return self.state.global_step < self._num_intermediate_steps

    @property
    def _num_intermediate_steps(self) -> int:
        return round(self.args.intermediate_share * max(self.state.max_steps, 1))

    def student_signals(self):
        if not self.is_intermediate:
            return super().student_signals()
        layers = range(len(self.layer_map)) if self.args.attention_weight else ()
        return {"attention": layers, "hidden_states": range(len(self.layer_map) + 1)}

    def teacher_signals(self):
        if not self.is_intermediate:
            return super().teacher_signals()
        layers = [number - 1 for number in self.layer_map] if self.args.attention_weight else ()
        return {"attention": layers, "hidden_states": [0, *self.layer_map]}

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        if not self.is_intermediate:
            return super().distillation_losses(student, teacher, inputs)
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
