"""Layer pruning: a model learns to do without some of its layers, of which some are then taken out.

LayerDrop: Fan et al., 2020, https://arxiv.org/abs/1909.11556. In training each layer is passed over with probability
`drop_rate`, drawn anew for every batch; afterwards a share of the layers goes without any further training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_compress.model.anatomy import anatomy
from hf_compress.model.record import read_part
from hf_compress.pruning.importance import every_other
from hf_compress.pruning.masks import check_prunable
from hf_compress.pruning.trainer import PruningTrainer
from hf_compress.surgery.layers import kept_by_stack, prune_layers
from hf_compress.surgery.settle import build_twin
from hf_compress.training.arguments import CompressionArguments
from hf_compress.training.callback import PieceCallback
from hf_compress.training.pieces import Piece


class LayerPruning(PieceCallback):
    """Callback for any `Trainer`: LayerDrop while it trains; `finish` takes layers out.

    Args:
        drop_rate: probability that a layer is passed over in a training pass, at least 0 and below 1.
        share: share of the layers that goes in the end: every other one when it is a half.
        keep: the layers that stay, numbered as in `anatomy(model).layers`, in place of `share`; for example what
            `search_layers` found.

    In eval mode the layers that go are passed over, so that each evaluation scores the model that `finish` gives. A
    layer that is passed over still runs, so that no type of attention or parallel training has to know; its output is
    not used. Raises ValueError for rates and layers that cannot be.
    """

    name = "layer_pruning"

    def __init__(self, drop_rate: float = 0.2, *, share: float = 0.5, keep: Sequence[int] | None = None):
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is a probability, at least 0 and below 1, got {drop_rate}.")
        if not 0 < share < 1:
            raise ValueError(f"share of layers that go must lie between 0 and 1, got {share}.")
        self.drop_rate, self.share, self.keep = drop_rate, share, None if keep is None else sorted(keep)
        self._handles: list[Any] = []

    def training_state_entries(self, model: nn.Module) -> dict[str, Tensor]:
        self.check(model, [self])
        return {}

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        prune_layers(build_twin(model, model.config, read_part(model.config, "structure")), self.kept_layers(model))

    def kept_layers(self, model: nn.Module) -> list[int]:
        """The layers that will stay: `keep`, or those that `share` leaves of each encoder and decoder."""
        parts = anatomy(model)
        stacks = [len(stack.layers) for stack in parts.stacks]
        if self.keep is None:
            return [sum(stacks[:i]) + kept for i, n in enumerate(stacks) for kept in every_other(n, self.share)]
        kept_by_stack(parts, self.keep)
        return self.keep

    def removed_layers(self, model: nn.Module) -> set[int]:
        return set(range(len(anatomy(model).layers))) - set(self.kept_layers(model))

    def on_train_begin(self, args: TrainingArguments, state, control, model: nn.Module = None, **kwargs) -> None:
        super().on_train_begin(args, state, control, model=model)
        self.close()
        layers, removed = [layer.module for layer in anatomy(model).layers], self.removed_layers(model)
        self._dropped = [False] * len(layers)
        for i, layer in enumerate(layers):
            hook = partial(self._pass_over, i, i in removed)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        if self.drop_rate:
            self._handles.append(model.register_forward_pre_hook(self._draw))

    def _draw(self, module: nn.Module, args: tuple) -> None:
        # by the CPU's generator, whose state Trainer saves: a resumed training draws the same layers
        if module.training:
            self._dropped = (torch.rand(len(self._dropped)) < self.drop_rate).tolist()

    def _pass_over(
        self, number: int, is_removed: bool, module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple
    ) -> Tensor | tuple:
        if not (self._dropped[number] if module.training else is_removed):
            return output
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.drop_rate:
            self._handles.pop().remove()
            self._dropped = [False] * len(self._dropped)

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

    def __post_init__(self):
        super().__post_init__()
        self.callback()  # checks the values

    def callback(self) -> LayerPruning:
        keep = None if self.keep is None else [int(number) for number in self.keep.split(",")]
        return LayerPruning(self.drop_rate, share=self.share, keep=keep)


class LayerPruningTrainer(PruningTrainer):
    config_class = LayerPruningConfig
