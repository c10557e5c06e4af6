"""Hard-concrete gates: numbers between 0 and 1 that training opens or closes, with a gradient although they can be 0.

Louizos et al., 2018, https://arxiv.org/abs/1712.01312

    s = sigmoid((log u - log(1 - u) + log_alpha) / b),  u ~ U(0, 1)      gate = clamp(s (z - g) + g, 0, 1)
    P(gate > 0) = sigmoid(log_alpha - b log(-g / z))

A penalty on open gates enters as a gradient, so no loss has to know of it. At the end gates are 0 or 1.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from hf_compress.training.arguments import CompressionArguments
from hf_compress.training.callback import PieceCallback
from hf_compress.training.checks import check_own_gradients
from hf_compress.training.shards import cut_like, whole
from hf_compress.training.state import STATE_NAME

logger = logging.getLogger(__name__)

G, Z, B = -0.1, 1.1, 2 / 3  # stretch limits and temperature


def sample_gates(log_alpha: Tensor) -> Tensor:
    """One draw of each gate, in [0, 1], with a gradient for `log_alpha`."""
    u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.logit() + log_alpha) / B)
    return (s * (Z - G) + G).clamp(0, 1)


def settled_gates(log_alpha: Tensor) -> Tensor:
    """The gates without noise, for evaluation."""
    return (torch.sigmoid(log_alpha) * (Z - G) + G).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not exactly 0."""
    return torch.sigmoid(log_alpha - B * math.log(-G / Z))


class LearnedGates(PieceCallback):
    """Base of callbacks for the trainers of hf_compress whose gates learn beside the model.

    Args:
        gate_rate: `log_alpha` learns this many times as fast as the model (with Adam), whose rates suit its weights.
        initial: `log_alpha` in the beginning; 2.0 is a gate at 0.96.
        end: share of the training after which each gate is settled at 0 or 1; what follows is recovery.

    The gates are parameters, so this does not work with a stock `Trainer`, which raises ValueError.
    """

    def __init__(self, *, gate_rate: float, initial: float, end: float):
        if gate_rate <= 0:
            raise ValueError(f"gate_rate must be above 0, got {gate_rate}.")
        if not 0 < end <= 1:
            raise ValueError(f"end is a share of the training, above 0 and at most 1, got {end}.")
        self.gate_rate, self.initial, self.end = gate_rate, initial, end
        self._places: Sequence[Any] = ()
        self._handles: list[Any] = []
        self._open: list[Tensor] = []  # once they are settled
        self._end = 0

    # What the methods override

    def places(self, model: nn.Module) -> Sequence[Any]:
        """What has gates. Raises ValueError if `model` has none."""
        raise NotImplementedError

    def num_gates(self, place: Any) -> int:
        raise NotImplementedError

    def attach(self, number: int) -> Any:
        """Let place `number` compute with its `gates_of`. Returns a handle that can `remove` this."""
        raise NotImplementedError

    def slopes(self, state: TrainerState) -> list[Tensor]:
        """d penalty / d log_alpha of each place, at this step."""
        raise NotImplementedError

    def chosen(self) -> list[Tensor]:
        """The gates that will be 1, as booleans."""
        return [self.log_alpha(i).detach() >= 0 for i in range(len(self._places))]

    def silence_(self, place: Any, is_open: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Changes the weights: zeros for what is closed."""
        raise NotImplementedError

    # State

    def training_state_entries(self, model: nn.Module) -> dict[str, nn.Parameter | Tensor]:
        self._places = self.places(model)
        start = [torch.full((self.num_gates(place),), self.initial / self.gate_rate) for place in self._places]
        return {f"{self.name}_{i}": nn.Parameter(value) for i, value in enumerate(start)}

    def log_alpha(self, number: int) -> Tensor:
        """Of one place. The parameter is smaller by `gate_rate`, so steps in it count for more.

        Under FSDP2, outside a forward pass, all ranks have to ask, for this as for `gates`.
        """
        return whole(getattr(self._state, f"{self.name}_{number}")) * self.gate_rate

    def gates(self) -> list[Tensor]:
        """The gates of each place without noise; 0 or 1 once they are settled."""
        return [self.gates_of(i, is_noisy=False).detach() for i in range(len(self._places))]

    def gates_of(self, number: int, *, is_noisy: bool) -> Tensor:
        log_alpha = self.log_alpha(number)
        if self._open:
            # in the graph, though without a gradient: DDP waits for one of each parameter
            return self._open[number].to(log_alpha.dtype) + 0 * log_alpha
        return sample_gates(log_alpha) if is_noisy else settled_gates(log_alpha)

    # Events of the trainer

    def is_done(self, step: int) -> bool:
        return step >= self._end > 0

    def on_train_begin(self, args: TrainingArguments, state, control, model: nn.Module = None, **kwargs) -> None:
        check_own_gradients(args, "Pruning")
        super().on_train_begin(args, state, control, model=model)
        self._state = getattr(model, STATE_NAME, None)
        if not hasattr(self._state, f"{self.name}_0"):
            raise ValueError(
                f"{type(self).__name__} learns parameters of its own, which a stock Trainer does not train: use "
                f"{type(self).__name__}Trainer, or pass it as callbacks=[...] to another trainer of hf_compress."
            )
        self._end = max(round(self.end * state.max_steps), 1)
        self._open = self.chosen() if self.is_done(state.global_step) else []
        self.close()
        self._handles = [self.attach(i) for i in range(len(self._places))]

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        slopes = [] if self._open else self.slopes(state)
        for i in range(len(self._places)):
            parameter = getattr(self._state, f"{self.name}_{i}")
            if not slopes:
                parameter.grad = None  # not even momentum moves it
                continue
            slope = cut_like(slopes[i] * self.gate_rate, parameter)  # d penalty / d parameter
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        if self.is_done(state.global_step + 1):
            self._silence(optimizer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if not self.is_done(state.global_step):
            logger.warning("%s: the training ended early, with gates half open that are now 0 or 1.", self.name)
        self.settle()

    def settle(self) -> None:
        """Gates that are 0 or 1 are zeros in the weights, or nothing: no hook is needed any more."""
        if self._handles:
            self._silence()
            self.close()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _silence(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        is_first, self._open = not self._open, self.chosen()
        if is_first and not any(bool(is_open.any()) for is_open in self._open):
            logger.warning(
                "%s: no gate is left open, so all go: the penalty outweighs the loss. Weaken it, or lower gate_rate.",
                self.name,
            )
        for place, is_open in zip(self._places, self._open, strict=True):
            self.silence_(place, is_open, optimizer)


@dataclass
class GatesConfig(CompressionArguments):
    """What every training of gates is told; a subclass names its `gates`, which take the rest of its own fields."""

    gates: ClassVar[type[LearnedGates]]

    gate_rate: float = field(
        default=1000.0, metadata={"help": "How many times as fast as the model the gates learn (with Adam)."}
    )
    initial: float = field(default=2.0, metadata={"help": "log_alpha in the beginning; 2.0 is a gate at 0.96."})
    end: float = field(
        default=0.7, metadata={"help": "Share of the training after which gates are settled at 0 or 1; above 0 to 1."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.callback()  # checks the values

    def callback(self) -> LearnedGates:
        shared = {own.name for own in fields(CompressionArguments)}
        names = (own.name for own in fields(self) if own.name not in shared)
        return self.gates(**{name: getattr(self, name) for name in names})
