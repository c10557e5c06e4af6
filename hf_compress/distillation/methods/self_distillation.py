"""Self-distillation: exits at a model's inner layers learn from its own last layer, and the layers below with them.

Zhang et al., 2019, https://arxiv.org/abs/1905.08094

    loss = task loss + sum over exits m of (1 - alpha) * task loss_m + alpha * soft loss_m + hint_weight * hint loss_m

soft loss_m is the distance of the exit's predictions to the model's, hint loss_m the MSE of W_m H[m] to the last hidden
state, W_m learned; no gradient flows into either target. An exit is a copy of the model's own head that reads the state
of an inner layer. The paper puts layers of its own before it; without them any exit and the layers below it are an
ordinary, shallower model.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import check_one_stack, num_layers
from hf_compress.distillation.losses.sums import Loss, hidden_state_loss
from hf_compress.distillation.runs import Run
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.model.tasks import plain_model
from hf_compress.surgery.layers import prune_layers
from hf_compress.training.state import TrainingState


@dataclass
class SelfDistillationConfig(DistillationConfig):
    exits: str | None = field(
        default=None, metadata={"help": "Layers that get an exit, such as `2,4`; all but the last by default."}
    )
    hint_weight: float = field(default=0.1, metadata={"help": "Weight of the hint losses; 0 leaves them out."})

    def __post_init__(self):
        super().__post_init__()
        if self.hints or self.teacher_noise or self.teacher_bits:
            raise ValueError(
                f"In self-distillation there is no other model: hints={self.hints}, teacher_noise={self.teacher_noise} "
                f"and teacher_bits={self.teacher_bits} do not go with it."
            )


class SelfDistillationTrainer(DistillationTrainer):
    """A `Trainer` whose model teaches its own exits. Needs labels, and no teacher.

    `save_model` saves the model alone; `exit_model(layer)` gives an exit with the layers below it. Each exit's losses
    are logged as `exit_1_task_loss` and so on. Raises ValueError for encoder-decoders, models of pixels, and layers
    that are not there.
    """

    config_class = SelfDistillationConfig
    takes_terms = False
    needs_labels = needs_logits = True

    def __init__(self, model=None, args=None, *positional, **kwargs):
        super().__init__(model, args, *positional, teacher_model=_Itself(), **kwargs)

    def check_layers(self) -> None:
        super().check_layers()
        check_one_stack(self.model, self.model, type(self).__name__)
        model, depth = plain_model(self.model), num_layers(self.model)
        if model.main_input_name != "input_ids":
            raise ValueError(f"{type(self).__name__} reads text, but {type(model).__name__} {model.main_input_name}.")
        given = self.args.exits or ",".join(map(str, range(1, depth)))
        try:
            self.exits = [int(layer) for layer in given.split(",")]
        except ValueError:
            raise ValueError(f"exits are numbers of layers such as `2,4`, got {self.args.exits!r}.") from None
        if outside := [layer for layer in self.exits if not 1 <= layer < depth]:
            raise ValueError(f"An exit must lie between layer 1 and {depth - 1}, below the last, got {outside[0]}.")

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = TrainingState()
        model = plain_model(model)
        self._num_outputs, names = _head(model)
        width = model.config.hidden_size
        for layer in self.exits:
            own = {_key(name): nn.Parameter(model.get_parameter(name).detach().clone()) for name in names}
            state.add(f"exit_{layer}", nn.ParameterDict(own))
            if self.args.hint_weight:
                state.add(f"hint_{layer}", nn.Linear(width, width, bias=False))
        return state

    def student_signals(self) -> dict[str, Iterable[int]]:
        return {"hidden_states": [*self.exits, num_layers(self.model)]}

    def teacher_signals(self) -> dict[str, Iterable[int]]:
        return {}

    def run_teacher(self, inputs: dict) -> Run:
        return Run({}, torch.empty(0), {}, {})  # it is the student's own run

    def teacher_logits(self, outputs, student_logits: Tensor, inputs: dict) -> Tensor:
        return student_logits.detach()

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        losses = {"task_loss": Loss(self.task_loss(student, inputs), "label")}
        last = student.hidden_states[num_layers(self.model)].detach()
        for layer in self.exits:
            run = self.run_exit(layer, student.hidden_states[layer], inputs)
            for name, loss in self.prediction_losses(run, teacher, inputs).items():
                losses[f"exit_{layer}_{name}"] = loss
            if self.args.hint_weight:
                states = getattr(self.training_state, f"hint_{layer}")(run.hidden_states[layer].float())
                weights, unit = self.task.tokens(states, inputs)
                distance = hidden_state_loss(states, last, weights)
                losses[f"exit_{layer}_hint_loss"] = Loss(distance, unit, self.args.hint_weight)
        return losses

    def run_exit(self, layer: int, state: Tensor, inputs: dict) -> Run:
        """What the exit makes of `state` (B, T, D), the output of `layer`: the model's forward without its layers."""
        model = plain_model(self.model)
        own = getattr(self.training_state, f"exit_{layer}")
        if any(hasattr(parameter, "ds_id") for parameter in own.values()):
            raise ValueError(
                f"{type(self).__name__} runs the model's head with each exit's own weights, which ZeRO-3 has cut into "
                "pieces. Use ZeRO-2, FSDP2 or DDP."
            )
        named = {f"model.{_name(key)}": parameter for key, parameter in own.items()}
        with _passing(model, state, self._num_outputs), self.accelerator.autocast():
            outputs = functional_call(_Forward(model), named, (), self.student_inputs(model, inputs))
        return Run(outputs, self.task.logits(outputs, inputs), {layer: state}, {})

    @torch.no_grad()
    def exit_model(self, layer: int) -> PreTrainedModel:
        """The exit of `layer` as a model of its own: the layers up to it and the exit's head, to save or to measure."""
        if layer not in self.exits:
            raise ValueError(f"There is no exit at layer {layer}: the exits are {self.exits}.")
        model = prune_layers(copy.deepcopy(plain_model(self.model)), keep=range(layer))
        for key, parameter in getattr(self.training_state, f"exit_{layer}").items():
            model.get_parameter(_name(key)).copy_(parameter)
        return model.eval()


class _Itself(nn.Module):
    """Stands where others have a teacher: there is nothing to check, and nothing to run."""

    def forward(self) -> None: ...


class _Forward(nn.Module):
    """The forward of `model` without its hooks: inside a hook of the model, a call would not end."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model.forward(**inputs)


@contextmanager
def _passing(model: nn.Module, state: Tensor, num_outputs: int | None) -> Iterator[None]:
    """While open, the layers of `model` compute nothing: what comes out of the last is `state`.

    num_outputs: the length of the tuples that layers return, None where they return the state alone.
    """

    def give(hidden_states: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor | None, ...]:
        return state if num_outputs is None else (state, *[None] * (num_outputs - 1))

    layers = [layer.module for layer in anatomy(model).layers]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = give
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _head(model: PreTrainedModel) -> tuple[int | None, list[str]]:
    """How many outputs a layer returns (None for a bare state), and the parameters that run after the last layer.

    Found by running a few tokens: they are those that logits depend on when the layers are passed over. Input
    embeddings that double as output embeddings stay shared with the model.
    """
    was_training, seen = model.training, []
    layers = anatomy(model).layers
    handle = layers[-1].module.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = {"input_ids": model.dummy_inputs["input_ids"][:1].to(model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    try:
        with torch.no_grad():
            model.eval()(**inputs)
        handle.remove()
        num_outputs = len(seen[0]) if isinstance(seen[0], tuple) else None
        state = seen[0] if num_outputs is None else seen[0][0]
        with torch.enable_grad(), _passing(model, state, num_outputs):
            outputs = model(**inputs)
    finally:
        handle.remove()
        model.train(was_training)
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in shared}
    logits = sum(v.sum() for k, v in outputs.items() if k.endswith("logits"))
    gradients = torch.autograd.grad(logits, list(named.values()), allow_unused=True)
    return num_outputs, [name for name, gradient in zip(named, gradients, strict=True) if gradient is not None]


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's attribute has no dots


def _name(key: str) -> str:
    return key.replace("/", ".")
