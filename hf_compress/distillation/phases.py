"""Phases of one training: in each other losses, with a warm-up and a decay of the learning rate of its own.

phases=[
    hfc.Phase(0.7, [hfc.TinyBertLayers()], predictions=False),
    hfc.Phase(0.3, [hfc.Flows()], learning_rate=1e-5, frozen=2),
]

Layers frozen from below, stage by stage: Sun et al., 2020 (MobileBERT), https://arxiv.org/abs/2004.02984, section 3.3.
In stage l all that the output of layer l - 1 is computed with stays as it is: embeddings, and the layers below l.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_compress.distillation.terms import Term
from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model


@dataclass
class Phase:
    """A share of the steps, and what is learned in them.

    predictions    whether the task loss and the soft loss belong to it, besides its terms
    learning_rate  at its start; that of the config when not given
    frozen         how many layers, from below, do not learn; `frozen_layers` of the config when not given
    """

    share: float
    terms: Sequence[Term] = ()
    predictions: bool = True
    learning_rate: float | None = None
    frozen: int | None = None


def used(phases: Sequence[Phase]) -> list[Phase]:
    """The phases that have steps. Raises ValueError for shares that are not those of a whole, or a phase of nothing."""
    shares = [phase.share for phase in phases]
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"The shares of the phases must be 0 or more and sum to 1, got {shares}.")
    for phase in phases:
        if phase.share and not (phase.predictions or phase.terms):
            raise ValueError("A phase without terms and without predictions would learn nothing.")
    return [phase for phase in phases if phase.share]


class Phased(Trainer):
    """For trainers with `self.phases`, those that have steps."""

    phases: Sequence[Phase]

    def starts(self, num_steps: int) -> list[int]:
        """The step at which each phase starts, and the end of the last."""
        return [0, *(round(share * num_steps) for share in accumulate(p.share for p in self.phases[:-1])), num_steps]

    @property
    def phase(self) -> Phase:
        """That of this step, or of an evaluation after it; before training it is the first."""
        if not self.state.max_steps:
            return self.phases[0]
        ends = self.starts(self.state.max_steps)[1:-1]
        return self.phases[sum(self.state.global_step >= end for end in ends)]

    def frozen_in(self, phase: Phase) -> int:
        return self.args.frozen_layers if phase.frozen is None else phase.frozen

    def check_frozen(self) -> None:
        """Raise ValueError for layers that are not there, and for a training that hides what they compute with."""
        counts = [self.frozen_in(phase) for phase in self.phases]
        if not any(counts):
            return
        depth = len(anatomy(plain_model(self.model)).layers)
        if outside := [count for count in counts if not 0 <= count <= depth]:
            raise ValueError(f"Frozen layers are counted from below, 0 to {depth} of this student, got {outside[0]}.")
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.args.torch_compile or self.is_fsdp_enabled or self.is_deepspeed_enabled or reentrant:
            raise ValueError(
                "What frozen layers compute with is read from the graph of each step, which torch_compile, FSDP, "
                "DeepSpeed and reentrant checkpointing hide. Train by DDP or in one process, without torch_compile, "
                "and with gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """As in `Trainer`; what is frozen has no gradient afterwards: no optimizer moves it, and no norm counts it."""
        if not (number := self.frozen_in(self.phase)):
            return super().training_step(model, inputs, num_items_in_batch)
        student = plain_model(self.accelerator.unwrap_model(model))
        with used_below(student, number) as below:
            loss = super().training_step(model, inputs, num_items_in_batch)
        beside = {id(parameter) for parameter in self.training_state.parameters()}  # gates and scores learn on
        for parameter in (parameter for parameter in below if id(parameter) not in beside):
            parameter.grad = None
        if all(p.grad is None or id(p) in beside for p in student.parameters()):
            raise ValueError(
                f"The losses of this phase read nothing above the {number} layers that are frozen, so it would learn "
                "nothing: freeze fewer, or add a term of a layer above, or predictions."
            )
        return loss

    def is_complete(self) -> bool:
        """The losses of two phases are no measure for each other: only what the last one has trained competes."""
        is_last = len(self.phases) == 1 or self.state.global_step > self.starts(self.state.max_steps)[-2]
        return is_last and super().is_complete()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Linear warm-up and decay, once for each phase; another `lr_scheduler_type` spans all of them as usual."""
        has_own = len(self.phases) > 1 or self.phases[0].learning_rate is not None
        if self.lr_scheduler is None and has_own and self.args.lr_scheduler_type == "linear":
            usual = self.args.learning_rate
            spans = list(pairwise(self.starts(num_training_steps)))

            def factor(step: int) -> float:
                number = min(sum(step >= end for _, end in spans), len(spans) - 1)
                (start, end), own = spans[number], self.phases[number].learning_rate
                ratio = 1.0 if own is None else own / usual if usual else 0.0
                return ratio * _warm_up_and_decay(step - start, end - start, self.args.get_warmup_steps(end - start))

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


@contextmanager
def used_below(model: nn.Module, number: int) -> Iterator[set[nn.Parameter]]:
    """While open, the first forward fills the set: the parameters that the output of the first `number` layers needs.

    What is tied to them is among them, and of a decoder's layers all of its encoder.
    """
    found: set[nn.Parameter] = set()

    def walk(layer: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        if not found:
            found.update(parameters_of(output[0] if isinstance(output, tuple) else output))

    handle = anatomy(model).layers[number - 1].module.register_forward_hook(walk)
    try:
        yield found
    finally:
        handle.remove()


def parameters_of(tensor: Tensor) -> set[nn.Parameter]:
    """The parameters that `tensor` was computed with and has a gradient for: the leaves of its graph."""
    found, seen, rest = set(), set(), [tensor.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            found.add(node.variable)
        rest += [before for before, _ in node.next_functions]
    return found


def _warm_up_and_decay(step: int, num_steps: int, num_warm_up_steps: int) -> float:
    if step < num_warm_up_steps:
        return step / max(num_warm_up_steps, 1)
    return max(0.0, (num_steps - step) / max(num_steps - num_warm_up_steps, 1))
