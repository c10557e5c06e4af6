"""A mark on models whose tensors would also fit a model that computes something else.

Layers that a shorter config builds differently have the same tensors as those it builds, so Transformers alone would
load them without a word. In what such a model saves, one norm outside the layers has its weight under another name, and
under the old one something that fits nowhere.
"""

from typing import Any

import torch
from torch import nn

from hf_compress.model.anatomy import anatomy
from hf_compress.model.classes import made_class

STORED_NAME = "weight_with_layers_of_a_deeper_model"


class Marked:
    """Mixin for a norm: in state dicts its weight has another name."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + STORED_NAME] = destination[f"{prefix}weight"]
        destination[f"{prefix}weight"] = torch.zeros(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + STORED_NAME in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(prefix + STORED_NAME)
        super()._load_from_state_dict(state_dict, prefix, *args)


def mark(model: nn.Module) -> None:
    """Changes `model`: from now on it says in what it saves that its layers are special."""
    _, norm = marked_norm(model)
    if not isinstance(norm, Marked):
        norm.__class__ = made_class(f"Marked{type(norm).__name__}", Marked, type(norm))


def unmark(model: nn.Module) -> None:
    """Changes `model`: takes the mark away, if it has one."""
    for module in model.modules():
        if isinstance(module, Marked):
            module.__class__ = type(module).__mro__[2]


def marked_norm(model: nn.Module) -> tuple[str, nn.Module]:
    """The norm that bears the mark: the first one of the backbone outside its layers, with its name.

    Raises ValueError if there is none.
    """
    stacks = tuple(f"{stack.name}." for stack in anatomy(model).stacks)
    backbone = set(model.base_model.modules())
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if module in backbone and weight is not None and weight.dim() == 1 and not f"{name}.".startswith(stacks):
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no norm outside its layers that could say that they are those of a deeper model, "
        "so these layers cannot be taken out. Keep the first layers instead."
    )


def expect_mark(model: nn.Module) -> None:
    """Changes `model`, which is on the meta device: its norm can take the weight under the name it is stored by."""
    _, norm = marked_norm(model)
    norm.register_parameter(STORED_NAME, nn.Parameter(torch.empty_like(norm.weight)))


def take_mark(model: nn.Module) -> None:
    """Changes `model`, whose tensors are loaded: the norm's weight goes where it belongs."""
    for module in model.modules():
        if STORED_NAME in module._parameters:
            module.weight = module._parameters.pop(STORED_NAME)
    mark(model)
