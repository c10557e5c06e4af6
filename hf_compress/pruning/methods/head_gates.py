"""Learned gates: each head has a gate between 0 and 1 that training opens or closes, under a penalty on open ones.

Louizos et al., 2018, https://arxiv.org/abs/1712.01312; for heads: Voita et al., 2019, https://arxiv.org/abs/1905.09418

    s = sigmoid((log u - log(1 - u) + log_alpha) / b),  u ~ U(0, 1)      gate = clamp(s (z - g) + g, 0, 1)
    penalty = l0 * sum over gates of sigmoid(log_alpha - b log(-g / z)), the expected number of open gates

The penalty enters as a gradient, so no loss has to know of it. At the end gates are 0 or 1 and heads go.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_compress.pruning.masks import Blocks, check_prunable
from hf_compress.pruning.methods.heads import check_heads, head_matrices
from hf_compress.pruning.trainer import PruningTrainer
from hf_compress.training.arguments import CompressionArguments
from hf_compress.training.callback import PieceCallback
from hf_compress.training.checks import check_own_gradients, check_whole
from hf_compress.training.pieces import Piece
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


class HeadGates(PieceCallback):
    """Callback for the trainers of hf_compress: learned gates on heads; `finish` cuts those whose gate is closed.

    Args:
        l0: weight of the expected number of open gates, beside the loss.
        gate_rate: `log_alpha` learns this many times as fast as the model (with Adam), whose rates suit its weights.
        initial: `log_alpha` in the beginning; 2.0 is a gate at 0.96.
        end: share of the training after which each gate is settled at 0 or 1, whichever is nearer; what follows is
            recovery.

    The gates are parameters, so this does not work with a stock `Trainer`, which raises ValueError.
    """

    name = "head_gates"
    cuts_silent = True
    units = {"heads": 1}

    def __init__(self, l0: float = 0.02, *, gate_rate: float = 1000.0, initial: float = 2.0, end: float = 0.7):
        if l0 < 0 or gate_rate <= 0:
            raise ValueError(f"l0 must be 0 or more and gate_rate above 0, got {l0} and {gate_rate}.")
        if not 0 < end <= 1:
            raise ValueError(f"end is a share of the training, above 0 and at most 1, got {end}.")
        self.l0, self.gate_rate, self.initial, self.end = l0, gate_rate, initial, end
        self._matrices: list[Blocks] = []
        self._handles: list[Any] = []
        self._end, self._is_settled = 0, False

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        check_heads(model)

    def is_done(self, step: int) -> bool:
        return step >= self._end > 0

    def training_state_entries(self, model: nn.Module) -> dict[str, nn.Parameter]:
        self._matrices = head_matrices(model)
        start = [torch.full((m.grid[1],), self.initial / self.gate_rate) for m in self._matrices]
        return {f"{self.name}_{i}": nn.Parameter(value) for i, value in enumerate(start)}

    def log_alpha(self, number: int) -> Tensor:
        """(H,) of one attention. The parameter is smaller by `gate_rate`, so steps in it count for more."""
        return getattr(self._state, f"{self.name}_{number}") * self.gate_rate

    def gates(self) -> list[Tensor]:
        """The gates of each attention without noise, (H,); 0 or 1 once they are settled."""
        return [self._gate(i, is_noisy=False).detach() for i in range(len(self._matrices))]

    def on_train_begin(self, args: TrainingArguments, state, control, model: nn.Module = None, **kwargs) -> None:
        check_whole(model, "Pruning")
        check_own_gradients(args, "Pruning")
        super().on_train_begin(args, state, control, model=model)
        self._state = getattr(model, STATE_NAME, None)
        if not hasattr(self._state, f"{self.name}_0"):
            raise ValueError(
                f"{type(self).__name__} learns parameters of its own, which a stock Trainer does not train: use "
                "HeadGatesTrainer, or pass it as callbacks=[...] to another trainer of hf_compress."
            )
        self._end = max(round(self.end * state.max_steps), 1)
        self._is_settled = self.is_done(state.global_step)
        self.close()
        self._handles = [
            m.module.register_forward_pre_hook(partial(self._scale, i)) for i, m in enumerate(self._matrices)
        ]

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        for i in range(len(self._matrices)):
            parameter = getattr(self._state, f"{self.name}_{i}")
            if self._is_settled:
                parameter.grad = None  # not even momentum moves it
                continue
            p = open_probability(self.log_alpha(i).detach())
            penalty = self.l0 * p * (1 - p) * self.gate_rate  # d penalty / d parameter
            parameter.grad = penalty if parameter.grad is None else parameter.grad + penalty

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        if self.is_done(state.global_step + 1):
            self._silence(optimizer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if not self.is_done(state.global_step):
            logger.warning("The training ended early: gates of heads that were half open are now open or closed.")
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
        self._is_settled = True
        for matrix, gates in zip(self._matrices, self.gates(), strict=True):
            matrix.silence_(gates[None].bool(), optimizer)

    def _gate(self, number: int, *, is_noisy: bool) -> Tensor:
        log_alpha = self.log_alpha(number)
        if self._is_settled:
            # in the graph, though without a gradient: DDP waits for one of each parameter
            return (log_alpha >= 0).to(log_alpha.dtype) + 0 * log_alpha
        return sample_gates(log_alpha) if is_noisy else settled_gates(log_alpha)

    def _scale(self, number: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, ...]:
        gates = self._gate(number, is_noisy=module.training)
        heads = args[0].unflatten(-1, (len(gates), -1))  # (B, T, H, Dh)
        return ((heads * gates[:, None].to(heads.dtype)).flatten(-2), *args[1:])  # (B, T, D)


@dataclass
class HeadGatesConfig(CompressionArguments):
    l0: float = field(default=0.02, metadata={"help": "Weight of the expected number of open gates; 0 or more."})
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

    def callback(self) -> HeadGates:
        return HeadGates(self.l0, gate_rate=self.gate_rate, initial=self.initial, end=self.end)


class HeadGatesTrainer(PruningTrainer):
    config_class = HeadGatesConfig
