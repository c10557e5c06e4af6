"""Learned gates: each head has a gate between 0 and 1 that training opens or closes, under a penalty on open ones.

Voita et al., 2019, https://arxiv.org/abs/1905.09418, with the gates of `hard_concrete`

    penalty = l0 * sum over gates of P(gate > 0), the expected number of open gates

At the end gates are 0 or 1 and heads go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState

from hf_compress.pruning.masks import Blocks, check_prunable
from hf_compress.pruning.methods.hard_concrete import GatesConfig, LearnedGates, open_probability
from hf_compress.pruning.methods.heads import check_heads, head_matrices
from hf_compress.pruning.trainer import PruningTrainer
from hf_compress.training.pieces import Piece


class HeadGates(LearnedGates):
    """Callback for the trainers of hf_compress: learned gates on heads; `finish` cuts those whose gate is closed.

    Args:
        l0: weight of the expected number of open gates, beside the loss: what a head has to be worth to stay.
        gate_rate, initial, end: as in `LearnedGates`; at `end` a gate is settled at 0 or 1, whichever is nearer.
    """

    name = "head_gates"
    cuts_silent = True
    units = {"heads": 1}

    def __init__(self, l0: float = 0.005, *, gate_rate: float = 1000.0, initial: float = 2.0, end: float = 0.7):
        if l0 < 0:
            raise ValueError(f"l0 must be 0 or more, got {l0}.")
        super().__init__(gate_rate=gate_rate, initial=initial, end=end)
        self.l0 = l0

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        check_heads(model)

    def places(self, model: nn.Module) -> list[Blocks]:
        return head_matrices(model)

    def num_gates(self, place: Blocks) -> int:
        return place.grid[1]

    def attach(self, number: int) -> Any:
        return self._places[number].module.register_forward_pre_hook(partial(self._scale, number))

    def slopes(self, state: TrainerState) -> list[Tensor]:
        probabilities = [open_probability(self.log_alpha(i).detach()) for i in range(len(self._places))]
        return [self.l0 * p * (1 - p) for p in probabilities]

    def silence_(self, place: Blocks, is_open: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        place.silence_(is_open[None], optimizer)

    def _scale(self, number: int, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, ...]:
        gates = self.gates_of(number, is_noisy=module.training)
        heads = args[0].unflatten(-1, (len(gates), -1))  # (B, T, H, Dh)
        return ((heads * gates[:, None].to(heads.dtype)).flatten(-2), *args[1:])  # (B, T, D)


@dataclass
class HeadGatesConfig(GatesConfig):
    gates = HeadGates

    l0: float = field(default=0.005, metadata={"help": "Weight of the expected number of open gates; 0 or more."})


class HeadGatesTrainer(PruningTrainer):
    config_class = HeadGatesConfig
