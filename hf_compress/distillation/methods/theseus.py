"""BERT-of-Theseus: the teacher's layers are replaced by the student's, one module after the other.

Xu et al., 2020, https://arxiv.org/abs/2002.02925

    first phase:   each student layer stands for a group of teacher layers. In each forward it replaces its group with
                   probability p, which rises linearly to 1; else the group itself runs, frozen
    second phase:  the student alone, all of it, is fine-tuned

The only loss is the task loss. Embeddings and head stay as they are in the first phase.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from hf_compress.distillation.layer_map import check_one_stack, uniform
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.phases import Phase
from hf_compress.distillation.runs import Run
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.several_teachers import SeveralTeachers
from hf_compress.distillation.teachers.teacher import frozen
from hf_compress.distillation.two_phases import TwoPhaseConfig, TwoPhaseTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model


@dataclass
class TheseusConfig(TwoPhaseConfig):
    alpha: float = field(default=0.0, metadata={"help": "Always 0: there is no soft loss."})
    intermediate_share: float = field(
        default=0.6, metadata={"help": "Share of the steps in which layers are replaced, before fine-tuning; 0 to 1."}
    )
    replacing_rate: float = field(
        default=0.3, metadata={"help": "Probability at the first step that a student layer is used; rises to 1."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.replacing_rate <= 1:
            raise ValueError(f"replacing_rate is a probability, 0 to 1, got {self.replacing_rate}.")
        if self.alpha or self.hints or self.torch_compile:
            raise ValueError(
                f"BERT-of-Theseus learns from the task loss alone, through layers that change from step to step: alpha="
                f"{self.alpha}, hints={self.hints} and torch_compile={self.torch_compile} do not go with it."
            )


@contextmanager
def stand_ins(student: nn.Module, teacher: nn.Module, replaced: Tensor) -> Iterator[None]:
    """While open, each student layer whose entry in `replaced` (student's layers,) is False runs teacher layers."""
    mine, theirs = _layers(student), _layers(teacher)
    groups = pairwise([0, *uniform(len(mine), len(theirs))])  # where each starts and ends
    absent = [(mine[i], group) for i, group in enumerate(groups) if not replaced[i]]
    for layer, (start, end) in absent:
        layer.forward = partial(_run, theirs[start:end])
    try:
        yield
    finally:
        for layer, _ in absent:
            del layer.forward


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for stack in anatomy(model).stacks for layer in stack.modules]


def _run(group: list[nn.Module], hidden_states: Tensor, *args, **kwargs):
    for layer in group:
        outputs = layer(hidden_states, *args, **kwargs)
        hidden_states = outputs[0] if isinstance(outputs, tuple) else outputs
    return outputs


class TheseusTrainer(TwoPhaseTrainer):
    """Train the student's layers among the teacher's, then the student alone. Needs labels.

    Make the student with `hfc.make_student`: it has the teacher's embeddings, head and width. Raises ValueError for
    widths that differ, a student that is not shallower, layers of several kinds, and a teacher without weights.
    """

    config_class = TheseusConfig
    takes_terms = False
    needs_labels = True
    needs_logits = False  # its layers run inside the student

    def prepare_teacher(self, teacher: nn.Module) -> nn.Module:
        """Whole on each process, under FSDP2 too: its layers run without the model around them."""
        return frozen(teacher, self.args.device)

    def check_layers(self) -> None:
        super().check_layers()
        who = type(self).__name__
        if isinstance(self.teacher, CachedTeacher | SeveralTeachers):
            raise ValueError(f"{who} runs the teacher's layers inside the student: pass one teacher, not a cache.")
        check_one_stack(self.model, self.teacher, who)
        student, teacher = anatomy(self.model), anatomy(self.teacher)
        if student.hidden_size != teacher.hidden_size:
            raise ValueError(
                f"{who} puts layers of one model into the other, so both need one width: the student's is "
                f"{student.hidden_size}, the teacher's {teacher.hidden_size}. Make the student without hidden_size."
            )
        if len(student.layers) >= len(teacher.layers):
            raise ValueError(
                f"{who} replaces groups of teacher layers by one each, so the student must be shallower: it has "
                f"{len(student.layers)} layers, the teacher {len(teacher.layers)}."
            )
        kinds = {type(layer) for layer in [*_layers(self.model), *_layers(self.teacher)]}
        masks = set(getattr(plain_model(self.teacher).config, "layer_types", None) or ())
        if len(kinds) > 1 or len(masks) > 1:
            raise ValueError(
                f"{who} needs layers that are called alike, but these are {sorted(k.__name__ for k in kinds)} with "
                f"attention {sorted(masks)}. Use DistillationTrainer."
            )

    @property
    def rate(self) -> float:
        """The probability that a student layer is used at this step: linear from `replacing_rate` to 1."""
        steps = round(self.args.intermediate_share * self.state.max_steps)
        if not self.is_intermediate:
            return 1.0
        start = self.args.replacing_rate
        return min(1.0, start + (1 - start) * self.state.global_step / max(steps - 1, 1))

    def make_phases(self) -> list[Phase]:
        share, rate = self.args.intermediate_share, self.args.prediction_learning_rate
        return [Phase(share), Phase(1 - share, learning_rate=rate)]

    @property
    def is_intermediate(self) -> bool:
        """Whether layers are replaced at this step."""
        return self.args.intermediate_share > 0 and self.phase is self.phases[0]

    def run_teacher(self, inputs: dict) -> Run:
        return Run({}, torch.empty(0), {}, {})  # its layers run inside the student

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        return {"task_loss": Loss(self.task_loss(student, inputs), "label")}

    def training_step(self, model, inputs, num_items_in_batch=None):
        student = plain_model(self.accelerator.unwrap_model(model))
        if not self.is_intermediate:
            return super().training_step(model, inputs, num_items_in_batch)
        replaced = torch.rand(len(_layers(student))) < self.rate
        if not replaced.any():  # nothing would learn
            replaced[torch.randint(len(replaced), ())] = True
        with stand_ins(student, self.teacher, replaced):
            loss = super().training_step(model, inputs, num_items_in_batch)
        learning = {id(p) for module in [*_layers(student), self.training_state] for p in module.parameters()}
        for parameter in student.parameters():
            if id(parameter) not in learning:
                parameter.grad = None  # the optimiser passes over it, weight decay included
        return loss
