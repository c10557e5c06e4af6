"""Layers that a shorter config would build differently, e.g. ModernBERT's first layer, which has no norm of its own.

The record then says which layers of which deeper config they are:

    "layers": {"config": {"num_hidden_layers": 4}, "keep": {"layers": [1, 2, 3]}}
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.model.anatomy import HEAD_DIM_NAMES, Layer, anatomy
from hf_compress.model.classes import plain_class
from hf_compress.model.record import find_name
from hf_compress.surgery.stand_ins import BIAS_TABLE, BiasConv1D, HeadlessAttention

DEPTH_FIELDS = (("num_hidden_layers",), ("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))
CACHED = "decoder_layers"
PER_LAYER_FIELDS = (  # lists with one entry for each layer
    "layer_types", "no_rope_layers", "mlp_layer_types", "attention_window", "attention_layers", "attention_types",
)  # fmt: skip

# What a module's `forward` reads of its own numbers, beside the shapes of its weights, and surgery changes.
ATTRIBUTES = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "num_key_value_heads",
    "num_key_value_groups",
    "all_head_size",
    "split_size",
    "intermediate_size",
    "layer_idx",
    "layer_id",
    "num_kv_heads",
    "kept_heads",
)
_SIZES = {*ATTRIBUTES, *HEAD_DIM_NAMES, "in_features", "out_features", "nf", "nx", "training", "gradient_checkpointing",
          "has_relative_attention_bias"}  # fmt: skip


def per_layer_changes(config: Any, depth: int, keep: Sequence[int]) -> dict[str, Any]:
    """Fields of a config that list something for each of `depth` layers -> the lists of the layers `keep`."""
    found = {name: getattr(config, name, None) for name in PER_LAYER_FIELDS}
    listed = {name: list(v) for name, v in found.items() if isinstance(v, (list, tuple)) and len(v) == depth}
    changes = {name: [values[i] for i in keep] for name, values in listed.items()}
    if "attention_layers" in changes and hasattr(config, "attention_types"):  # GPT-Neo: made of [[kinds, repeats], ...]
        changes["attention_types"] = [[changes["attention_layers"], 1]]
    return changes


def cache_depth(config: Any, depths: Sequence[int]) -> dict[str, int]:
    """What T5's config must say besides, once its encoder and decoder are of these different depths.

    `generate` makes a cache of `decoder_layers`, as most families call them, and of as many as the encoder has where a
    config has no such field: too few for a deeper decoder.
    """
    is_t5 = len(depths) == 2 and getattr(config, "num_decoder_layers", None) is not None
    return {CACHED: depths[1]} if is_t5 and (depths[0] != depths[1] or hasattr(config, CACHED)) else {}


def place_layers(model: nn.Module, layers: dict[str, Any]) -> None:
    """Changes `model`, which is on the meta device: its layers become those that a deeper config builds.

    Raises ValueError if the deeper model has no such layers, or `model` another number of them.
    """
    deeper = copy.deepcopy(model.config)
    try:
        for field, value in layers["config"].items():
            setattr(deeper, field, value)
        with torch.device("meta"):
            source = type(model)(deeper)
    except Exception as error:  # the fields come from a file, and each model fails over bad ones in its own way
        raise ValueError(
            f"structure: no {type(model).__name__} can be built with {layers['config']}: {error!r}."
        ) from error
    for stored, numbers in layers["keep"].items():
        name = find_name(model, stored)
        target = None if name is None else model.get_submodule(name)
        if not isinstance(target, nn.ModuleList):
            raise ValueError(f"structure: {stored!r} is no list of layers of {type(model).__name__}.")
        blocks = source.get_submodule(name)
        if len(target) != len(numbers) or not all(0 <= i < len(blocks) for i in numbers):
            raise ValueError(
                f"structure: layers {numbers} of {stored!r} do not fit: the config has {len(target)} layers, "
                f"the model they were taken from {len(blocks)}."
            )
        for i, number in enumerate(numbers):
            target[i] = number_layer(blocks[number], i)


def number_layer(block: nn.Module, number: int) -> nn.Module:
    """Changes `block`, a layer, and returns it: its parts now say that they are in layer `number`."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = number
    return block


def are_alike(model: nn.Module, twin: nn.Module) -> bool:
    """Whether the layers of both consist of the same modules with the same settings, sizes aside."""
    layers, others = anatomy(model).layers, anatomy(twin).layers
    return len(layers) == len(others) and all(map(_layers_are_alike, layers, others))


def _layers_are_alike(layer: Layer, other: Layer) -> bool:
    modules, others = (
        {name: m for name, m in one.module.named_modules() if not name.endswith(BIAS_TABLE)} for one in (layer, other)
    )
    return modules.keys() == others.keys() and all(
        isinstance(modules[name], HeadlessAttention) or _signature(modules[name]) == _signature(others[name])
        for name in modules
    )


def _signature(module: nn.Module) -> tuple[type, dict[str, Any], set[str]]:
    kind = Conv1D if isinstance(module, BiasConv1D) else plain_class(module)
    names = [name for name in vars(module) if not name.startswith("_") and name not in _SIZES]
    settings = {name: getattr(module, name) for name in names}
    plain = {name: value for name, value in settings.items() if isinstance(value, (int, float, str, type(None)))}
    return kind, plain, {*module._parameters, *module._buffers}
