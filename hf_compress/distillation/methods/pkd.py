"""PKD: the student imitates the first token's states of several teacher layers.

Sun et al., 2019, https://arxiv.org/abs/1908.09355

    loss = (1 - alpha) * task loss + alpha * soft loss + beta * patient loss
    patient loss = sum over j of || h_s[j] / |h_s[j]| - h_t[I(j)] / |h_t[I(j)]| ||^2     (eq. 7)

h are the states of the first real token; j runs over the student's layers but the last, which feeds the classifier. The
released code averages the patient loss over its layers and its D dimensions, so that its beta of 10 to 1000 (BERT-base,
five layers) is 0.003 to 0.26 here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import check_one_stack, make_layer_map, num_layers
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run, projection
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model
from hf_compress.training.state import TrainingState


@dataclass
class PatientOptions(TermOptions):
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


@dataclass
class PKDConfig(PatientOptions, DistillationConfig):
    temperature: float = field(
        default=5.0, metadata={"help": "Divides the logits before softmax; the paper's 5 to 20."}
    )


def patient_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Squared distance of normalised states (B, D), summed over the examples: eq. 7 for one pair of layers."""
    mine, theirs = F.normalize(exact(student_states), dim=-1), F.normalize(exact(teacher_states), dim=-1)
    return (mine - theirs).square().sum()


def first_token(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The state of each example's first real token, (B, D), of states (B, T, D) padded on either side."""
    if attention_mask is None:
        return states[:, 0]
    return states[torch.arange(len(states), device=states.device), attention_mask.bool().int().argmax(dim=1)]


class PatientStates(Term):
    """The patient loss. Widths that differ need `learn_projection=True`; the student has two layers or more, and is not
    causal, where the first token reads nothing but itself: else ValueError."""

    options_class, name = PatientOptions, "patient"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        check_one_stack(student, teacher, "PKD")
        depth, teacher_depth = num_layers(student), num_layers(teacher)
        if depth < 2:
            raise ValueError(
                f"PKD leaves the student's last layer out, so it needs 2 or more: the student has {depth}, the teacher "
                f"{teacher_depth}. Give the student more layers, or use DistillationTrainer."
            )
        firsts = [attention.module for layer in anatomy(student).layers for attention in layer.attentions[:1]]
        if any(getattr(module, "is_causal", False) for module in firsts):  # there may be none: FNet
            raise ValueError(
                f"PKD imitates the first token, which in {type(plain_model(student)).__name__} reads nothing but "
                "itself. Use DistillationTrainer with hints."
            )
        self.layer_map = make_layer_map(self.options.layer_map, student, teacher, without_last=True)
        widths = [plain_model(model).config.hidden_size for model in (student, teacher)]
        if widths[0] != widths[1] and not self.options.learn_projection:
            raise ValueError(
                f"PKD compares states of one width: the student's is {widths[0]}, the teacher's {widths[1]}. Make the "
                "student as wide (hfc.make_student without hidden_size), or set learn_projection=True."
            )
        self.student_signals = {"hidden_states": range(1, len(self.layer_map) + 1)}
        self.teacher_signals = {"hidden_states": self.layer_map}

    def make_state(self, student: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
        return {"patient": projection(student, teacher)}

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        mask, sums = inputs.get("attention_mask"), []
        for j, number in enumerate(self.layer_map, start=1):
            mine = first_token(student.hidden_states[j], mask)
            theirs = first_token(teacher.hidden_states[number], mask)
            sums.append(patient_loss(state.patient(mine.float()), theirs))
        return {"patient_loss": Loss(torch.stack(sums).sum(), "example", self.options.beta)}


class PKDTrainer(DistillationTrainer):
    """Patient knowledge distillation: predictions, and inner states of the first token."""

    config_class = PKDConfig

    def own_terms(self) -> list[Term]:
        return [*super().own_terms(), PatientStates(self.args)]
