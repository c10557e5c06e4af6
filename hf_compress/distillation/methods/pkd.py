"""PKD: the student imitates the first token's states of several teacher layers.

Sun et al., 2019, https://arxiv.org/abs/1908.09355

    loss = (1 - alpha) * task loss + alpha * soft loss + beta * patient loss
    patient loss = sum over j of || h_s[j] / |h_s[j]| - h_t[I(j)] / |h_t[I(j)]| ||^2     (eq. 7)

h are the states of the first real token; j runs over the student's layers but the last, which feeds the classifier. The
released code averages the patient loss over its layers and its D dimensions, so that its beta of 10 to 1000 (BERT-base,
five layers) is 0.003 to 0.26 here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import check_one_stack, make_layer_map, num_layers
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model
from hf_compress.training.state import TrainingState


@dataclass
class PKDConfig(DistillationConfig):
    temperature: float = field(
        default=5.0, metadata={"help": "Divides the logits before softmax; the paper's 5 to 20."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Weight of the patient loss; the released code's beta / (its layers * D)."}
    )
    layer_map: str = field(
        default="skip",
        metadata={
            "help": "Teacher layers of the student's layers but the last: `skip` (every k-th), `last` (those before "
            "the last), or numbers such as `2,4`."
        },
    )
    learn_projection: bool = field(
        default=False, metadata={"help": "Learn a map from the student's width to the teacher's, where they differ."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta must be 0 or more, got {self.beta}.")


def patient_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Squared distance of normalised states (B, D), summed over the examples: eq. 7 for one pair of layers."""
    mine, theirs = F.normalize(exact(student_states), dim=-1), F.normalize(exact(teacher_states), dim=-1)
    return (mine - theirs).square().sum()


def first_token(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The state of each example's first real token, (B, D), of states (B, T, D) padded on either side."""
    if attention_mask is None:
        return states[:, 0]
    return states[torch.arange(len(states), device=states.device), attention_mask.bool().int().argmax(dim=1)]


class PKDTrainer(DistillationTrainer):
    """Patient knowledge distillation: predictions, and inner states of the first token.

    Raises ValueError for widths that differ (unless `learn_projection=True`), for a student of one layer, and for
    causal models, whose first token reads nothing but itself.
    """

    config_class = PKDConfig

    def check_layers(self) -> None:
        super().check_layers()
        check_one_stack(self.model, self.teacher, type(self).__name__)
        depth, teacher_depth = num_layers(self.model), num_layers(self.teacher)
        if depth < 2:
            raise ValueError(
                f"PKD leaves the student's last layer out, so it needs 2 or more: the student has {depth}, the teacher "
                f"{teacher_depth}. Give the student more layers, or use DistillationTrainer."
            )
        if any(getattr(layer.attention.module, "is_causal", False) for layer in anatomy(self.model).layers):
            raise ValueError(
                f"PKD imitates the first token, which in {type(plain_model(self.model)).__name__} reads nothing but "
                "itself. Use DistillationTrainer with hints."
            )
        layers = "uniform" if self.args.layer_map == "skip" else self.args.layer_map
        self.layer_map = make_layer_map(layers, self.model, self.teacher, without_last=True)
        widths = [plain_model(model).config.hidden_size for model in (self.model, self.teacher)]
        if widths[0] != widths[1] and not self.args.learn_projection:
            raise ValueError(
                f"PKD compares states of one width: the student's is {widths[0]}, the teacher's {widths[1]}. Make the "
                "student as wide (hfc.make_student without hidden_size), or set learn_projection=True."
            )

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = super().make_training_state(model)
        state.add("patient", projection(model, self.teacher))
        return state

    def student_signals(self) -> dict[str, Iterable[int]]:
        own = range(1, len(self.layer_map) + 1)
        return {"hidden_states": sorted({*super().student_signals()["hidden_states"], *own})}

    def teacher_signals(self) -> dict[str, Iterable[int]]:
        return {"hidden_states": sorted({*super().teacher_signals()["hidden_states"], *self.layer_map})}

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        mask = inputs.get("attention_mask")
        project = self.training_state.patient
        sums = []
        for j, number in enumerate(self.layer_map, start=1):
            mine = first_token(student.hidden_states[j], mask)
            theirs = first_token(teacher.hidden_states[number], mask)
            sums.append(patient_loss(project(mine.float()), theirs))
        losses = super().distillation_losses(student, teacher, inputs)
        return {**losses, "patient_loss": Loss(torch.stack(sums).sum(), "example", self.args.beta)}
