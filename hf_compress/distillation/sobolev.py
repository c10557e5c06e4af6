"""Sobolev training: the student's logits change with its embedded text as the teacher's do.

Czarnecki et al., 2017, https://arxiv.org/abs/1706.04859, with the derivatives along random directions of section 2

    loss = sobolev_weight * mean over examples of |d<v, z_s> / dH_s - d<v, z_t> / dH_t|^2,   v ~ N(0, I / C)

z (C,) are an example's logits, H (T, D) its embedded tokens, what the first layer reads; in the mean over v this is the
squared distance of both Jacobians (C, T, D) over C. The gradient of the loss differentiates the student twice.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run, accepted, named
from hf_compress.distillation.teachers.adapter_teacher import AdapterTeacher
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.several_teachers import SeveralTeachers
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import auto_class_name, plain_model
from hf_compress.training.state import TrainingState

CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")


@dataclass
class InputGradientOptions(TermOptions):
    sobolev_weight: float = field(default=1.0, metadata={"help": "Weight of the distance of gradients, above 0."})

    def __post_init__(self):
        super().__post_init__()
        if self.sobolev_weight <= 0:
            raise ValueError(f"sobolev_weight must be above 0, got {self.sobolev_weight}.")


def directions(logits: Tensor) -> Tensor:
    """v for each example of logits (B, C); drawn by the CPU's generator, whose state Trainer saves."""
    return torch.randn(logits.shape).to(logits) / logits.shape[-1] ** 0.5


def slopes(logits: Tensor, states: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """d<v, z> / dH (B, T, D) of each example, whose logits (B, C) depend on its own states (B, T, D) alone."""
    (found,) = torch.autograd.grad((v * logits).sum(), states, create_graph=create_graph, retain_graph=True)
    return found


def sobolev_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of gradients (B, T, D), summed over tokens by `weights` (B, T), 0 for padding."""
    return ((exact(student) - exact(teacher)).square().sum(dim=-1) * (weights > 0)).sum()


class InputGradients(Term):
    """How predictions depend on the embedded tokens. For classifiers of one width, of which the student is `eager`."""

    options_class, name = InputGradientOptions, "sobolev"
    student_signals = {"hidden_states": [0]}
    needs_graph = True

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        who = "InputGradients"
        if isinstance(teacher, CachedTeacher | SeveralTeachers | AdapterTeacher):
            raise ValueError(f"{who} differentiates the teacher: pass one model, not a {type(teacher).__name__}.")
        for model in (student, teacher):
            if auto_class_name(model) not in CLASSIFIERS:
                raise ValueError(
                    f"{who} compares the gradients of one prediction for each text, and a {type(model).__name__} makes "
                    "another number of them: it fits sequence classification. Use hfc.Flows or hfc.Hints."
                )
        mine, theirs = anatomy(plain_model(student)).hidden_size, anatomy(plain_model(teacher)).hidden_size
        if mine != theirs:
            raise ValueError(
                f"{who} compares gradients for embedded tokens, which need one width: the student's is {mine}, the "
                f"teacher's {theirs}. Make the student without hidden_size, or use hfc.Hints, which learn a projection."
            )
        attention = getattr(plain_model(student).config, "_attn_implementation", None) or "eager"
        if attention != "eager":
            raise ValueError(
                f"{who} differentiates the student twice, which its fused attention ({attention}) cannot: call "
                "student.set_attn_implementation('eager'). The teacher may keep its own."
            )
        self.teacher = teacher

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        states = student.hidden_states[0]
        logits = self.task.logits(student.outputs, inputs)
        v = directions(logits)
        mine = slopes(logits, states, v, create_graph=True)
        weights, _ = self.tokens(states, inputs)
        loss = sobolev_loss(mine, self._of_teacher(inputs, v), weights)
        return {"sobolev_loss": Loss(loss, "example", self.options.sobolev_weight)}

    def _of_teacher(self, inputs: Mapping, v: Tensor) -> Tensor:
        """d<v, z> / dH of the teacher, whose weights have no gradient: what its first layer reads gets one."""
        labels = {"labels", "label", "label_ids"}
        inputs = accepted(self.teacher, {name: value for name, value in inputs.items() if name not in labels})
        with torch.enable_grad(), _differentiable(self.teacher) as states:
            logits = self.task.logits(named(self.teacher(**inputs), self.teacher), inputs)
        return slopes(logits, states[0], v).detach()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, what the first layer reads is a leaf, which has a gradient, kept in the list."""
    found: list[Tensor] = []

    def cut(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        found.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
        return ((found[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": found[0]})

    layer = anatomy(plain_model(model)).layers[0].module
    handle = layer.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
