"""Layer pruning: a model learns to do without some of its layers, of which some are then taken out.

LayerDrop: Fan et al., 2020, https://arxiv.org/abs/1909.11556. In training each layer is passed over with probability
`drop_rate`, drawn anew for every batch; afterwards a share of the layers goes without any further training. With
`learned`, each layer has a rate of its own (`drop_rates`), and those with the highest go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_compress.model.anatomy import Stack, anatomy
from hf_compress.model.record import read_part
from hf_compress.pruning.importance import every_other
from hf_compress.pruning.masks import check_prunable
from hf_compress.pruning.methods.drop_rates import draw, passed, rate_logits
from hf_compress.pruning.trainer import PruningTrainer
from hf_compress.surgery.layers import kept_by_stack, prune_layers
from hf_compress.surgery.position_bias import first_may_go
from hf_compress.surgery.settle import build_twin
from hf_compress.training.arguments import CompressionArguments
from hf_compress.training.callback import PieceCallback
from hf_compress.training.checks import check_own_gradients
from hf_compress.training.pieces import Piece
from hf_compress.training.shards import whole
from hf_compress.training.state import STATE_NAME


class LayerPruning(PieceCallback):
    """Callback for any `Trainer`: LayerDrop while it trains; `finish` takes layers out.

    Args:
        drop_rate: probability that a layer is passed over in a training pass, at least 0 and below 1.
        share: share of the layers that goes in the end: every other one when it is a half.
        keep: the layers that stay, numbered as in `anatomy(model).layers`, in place of `share`; for example what
            `search_layers` found.
        learned: each layer has a rate of its own, of which `drop_rate` is the mean, and those with the highest go. It
            needs a trainer of hf_compress.
        gate_rate: so many times as fast as the model such rates learn (with Adam).

    In eval mode the layers that go are passed over, so that each evaluation scores the model that `finish` gives. A
    layer that is passed over still runs, so that no type of attention or parallel training has to know; its output is
    not used. Raises ValueError for rates and layers that cannot be.
    """

    name = "layer_pruning"

    def __init__(
        self,
        drop_rate: float = 0.2,
        *,
        share: float = 0.5,
        keep: Sequence[int] | None = None,
        learned: bool = False,
        gate_rate: float = 1000.0,
    ):
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is a probability, at least 0 and below 1, got {drop_rate}.")
        if not 0 < share < 1:
            raise ValueError(f"share of layers that go must lie between 0 and 1, got {share}.")
        if learned and (keep is not None or not drop_rate or gate_rate <= 0):
            raise ValueError(
                "Learned drop rates choose the layers by their rates: they need a drop_rate and a gate_rate above 0, "
                f"and no layers to keep, got {drop_rate}, {gate_rate} and {keep}."
            )
        self.drop_rate, self.share, self.keep = drop_rate, share, None if keep is None else sorted(keep)
        self.learned, self.gate_rate = learned, gate_rate
        self._handles: list[Any] = []
        self._state: nn.Module | None = None

    def training_state_entries(self, model: nn.Module) -> dict[str, nn.Parameter]:
        self.check(model, [self])
        start = torch.zeros(len(anatomy(model).layers))
        return {f"{self.name}_rates": nn.Parameter(start)} if self.learned else {}

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        prune_layers(build_twin(model, model.config, read_part(model.config, "structure")), self.kept_layers(model))

    @property
    def rate_logits(self) -> Tensor:
        """log p / (1 - p) of each layer's learned drop rate p, (L,). Under FSDP2 all ranks have to ask."""
        return rate_logits(whole(getattr(self._state, f"{self.name}_rates")) * self.gate_rate, self.drop_rate)

    def kept_layers(self, model: nn.Module) -> list[int]:
        """The layers that will stay: `keep`, or those that `share` leaves of each encoder and decoder."""
        parts = anatomy(model)
        if self.keep is not None:
            kept_by_stack(parts, self.keep)
            return self.keep
        rates = self.rate_logits.tolist() if self._state is not None else [0.0] * len(parts.layers)
        kept, first = [], 0
        for stack in parts.stacks:
            own = rates[first : first + len(stack.layers)]
            kept += [first + i for i in self._kept_of(stack, own)]
            first += len(own)
        return kept

    def _kept_of(self, stack: Stack, rates: list[float]) -> list[int]:
        kept = every_other(len(rates), self.share)
        if not self.learned:
            return kept
        may_go = [i > 0 or first_may_go(stack) for i in range(len(rates))]
        return sorted(sorted(range(len(rates)), key=lambda i: (may_go[i], rates[i]))[: len(kept)])

    def removed_layers(self, model: nn.Module) -> set[int]:
        return set(range(len(anatomy(model).layers))) - set(self.kept_layers(model))

    def on_train_begin(self, args: TrainingArguments, state, control, model: nn.Module = None, **kwargs) -> None:
        if self.learned:
            self._find_state(args, model)
        super().on_train_begin(args, state, control, model=model)
        self.close()
        layers, self._removed = [layer.module for layer in anatomy(model).layers], self.removed_layers(model)
        self._dropped, self._drawn = [False] * len(layers), None
        for i, layer in enumerate(layers):
            self._handles.append(layer.register_forward_hook(partial(self._pass_over, i), with_kwargs=True))
        if self.drop_rate:
            self._handles.append(model.register_forward_pre_hook(self._draw))

    def _find_state(self, args: TrainingArguments, model: nn.Module) -> None:
        check_own_gradients(args, "Pruning")
        self._state = getattr(model, STATE_NAME, None)
        if not hasattr(self._state, f"{self.name}_rates"):
            raise ValueError(
                f"{type(self).__name__} with learned rates has parameters of its own, which a stock Trainer does not "
                f"train: use {type(self).__name__}Trainer, or pass it as callbacks=[...] to a trainer of hf_compress."
            )

    def _draw(self, module: nn.Module, args: tuple) -> None:
        if self.learned:
            self._drawn = draw(self.rate_logits) if module.training else None
            self._removed = self._removed if module.training else self.removed_layers(module)
        elif module.training:
            # by the CPU's generator, whose state Trainer saves: a resumed training draws the same layers
            self._dropped = (torch.rand(len(self._dropped)) < self.drop_rate).tolist()

    def _pass_over(self, number: int, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple):
        states = args[0] if args else kwargs["hidden_states"]
        if module.training and self._drawn is not None:
            states = passed(self._drawn[number], states, output[0] if isinstance(output, tuple) else output)
        elif not (self._dropped[number] if module.training else number in self._removed):
            return output
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def on_train_end(self, args, state, control, model: nn.Module = None, **kwargs) -> None:
        super().on_train_end(args, state, control, model=model)
        if self.drop_rate:
            self._handles.pop().remove()
            self._dropped, self._drawn = [False] * len(self._dropped), None
        if self.learned:
            self._removed = self.removed_layers(model)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass
class LayerPruningConfig(CompressionArguments):
    drop_rate: float = field(
        default=0.2, metadata={"help": "Probability that a layer is passed over in a training pass, 0 to below 1."}
    )
    share: float = field(default=0.5, metadata={"help": "Share of the layers that goes after training, 0 to 1."})
    keep: str | None = field(
        default=None, metadata={"help": "The layers that stay, such as `0,2,5`, in place of a share."}
    )
    learned: bool = field(
        default=False, metadata={"help": "Learn a drop rate for each layer; those with the highest go."}
    )
    gate_rate: float = field(
        default=1000.0, metadata={"help": "How many times as fast as the model learned rates learn (with Adam)."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.callback()  # checks the values

    def callback(self) -> LayerPruning:
        keep = None if self.keep is None else [int(number) for number in self.keep.split(",")]
        options = {"share": self.share, "keep": keep, "learned": self.learned, "gate_rate": self.gate_rate}
        return LayerPruning(self.drop_rate, **options)


class LayerPruningTrainer(PruningTrainer):
    config_class = LayerPruningConfig
