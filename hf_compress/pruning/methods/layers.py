"""Layer pruning: a model learns to do without some of its layers, of which some are then taken out.

LayerDrop: Fan et al., 2020, https://arxiv.org/abs/1909.11556. In training each layer is passed over with probability
`drop_rate`, drawn anew for every batch; afterwards a share of the layers goes without any further training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.importance import every_other
from hf_compress.pruning.masks import check_prunable
from hf_compress.pruning.trainer import PruningTrainer
from hf_compress.surgery import prune_layers


class LayerPruning(TrainerCallback):
    """Callback for any `Trainer`: LayerDrop while it trains; `finish` takes layers out.

    Args:
        drop_rate: probability that a layer is passed over in a training pass, at least 0 and below 1.
        share: share of the layers that goes in the end: every other one when it is a half.
        keep: the layers that stay, numbered as in `anatomy(model).layers`, in place of `share`; for example what
            `hfc.search_layers` found.

    A layer that is passed over still runs, so that no type of attention or parallel training has to know; its output
    is not used. Raises ValueError for rates and layers that cannot be.
    """

    def __init__(self, drop_rate: float = 0.2, *, share: float = 0.5, keep: Sequence[int] | None = None):
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is a probability, at least 0 and below 1, got {drop_rate}.")
        if not 0 < share < 1:
            raise ValueError(f"share of layers that go must lie between 0 and 1, got {share}.")
        self.drop_rate, self.share, self.keep = drop_rate, share, None if keep is None else list(keep)
        self._handles: list[Any] = []

    def training_state_entries(self, model: nn.Module) -> dict[str, Tensor]:
        check_prunable(model, type(self).__name__)
        self.kept_layers(model)  # what is wrong with it is said before training
        return {}

    def kept_layers(self, model: nn.Module) -> list[int]:
        """The layers that will stay: `keep`, or those that `share` leaves of each encoder and decoder."""
        stacks = [len(stack.layers) for stack in anatomy(model).stacks]
        if self.keep is None:
            return [sum(stacks[:i]) + kept for i, n in enumerate(stacks) for kept in every_other(n, self.share)]
        if unknown := sorted(set(self.keep) - set(range(sum(stacks)))):
            raise ValueError(f"keep names layers {unknown}, but the model has 0 to {sum(stacks) - 1}.")
        return self.keep

    def on_train_begin(self, args: TrainingArguments, state, control, model: nn.Module = None, **kwargs) -> None:
        self._close()
        check_prunable(model, type(self).__name__)
        layers = [layer.module for layer in anatomy(model).layers]
        dropped = [False] * len(layers)

        def draw(module: nn.Module, args: tuple) -> None:
            # by the CPU's generator, whose state Trainer saves: a resumed training draws the same layers
            dropped[:] = (
                (torch.rand(len(layers)) < self.drop_rate).tolist() if module.training else [False] * len(layers)
            )

        def pass_over(number: int):
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
                if not dropped[number]:
                    return output
                states = args[0] if args else kwargs["hidden_states"]
                return (states, *output[1:]) if isinstance(output, tuple) else states

            return hook

        handles = [layer.register_forward_hook(pass_over(i), with_kwargs=True) for i, layer in enumerate(layers)]
        self._handles = [model.register_forward_pre_hook(draw), *handles] if self.drop_rate else handles

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._close()

    def finish(self, model: nn.Module) -> nn.Module:
        """Take the layers out. Changes `model`, after training, and returns it."""
        return prune_layers(model, self.kept_layers(model))

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass
class LayerPruningConfig(TrainingArguments):
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
