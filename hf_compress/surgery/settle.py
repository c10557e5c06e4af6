"""Says in the config, or else in its record, how a model differs from what its config builds.

The answer is not kept by hand: a twin is built from the config on the meta device (no memory, milliseconds) and
compared with the model. What the config can say (fewer layers, the same width everywhere) goes into the config, so the
checkpoint stays an ordinary one; only the rest goes into the `structure` part of the record.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hf_compress.model.anatomy import HEAD_DIM_NAMES, in_features, is_projection, out_features
from hf_compress.model.cuttable import cuttable
from hf_compress.model.record import read_part, stored_name, write_part
from hf_compress.surgery.depth import ATTRIBUTES, are_alike, place_layers
from hf_compress.surgery.marks import mark, unmark

NEURON_FIELDS = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "d_ff")
STACK_NEURON_FIELDS = ("encoder_ffn_dim", "decoder_ffn_dim")


def settle(model: nn.Module, changes: dict[str, Any]) -> None:
    """Changes `model.config`: its fields and its record now describe `model`.

    `changes` are entries of the record's structure that a comparison cannot find out: which layers these once were.
    """
    config = model.config
    structure = {**read_part(config, "structure"), **changes}
    structure = {key: value for key, value in structure.items() if key not in ("shapes", "attributes")}
    without = {key: value for key, value in structure.items() if key != "layers"}
    if "layers" in structure and are_alike(model, build_twin(model, config, without)):
        structure = without
    found = _differences(model, config, structure)
    chosen: dict[str, Any] = {}
    for fields in _uniform_fields(model):
        if not found:
            break
        candidate = copy.deepcopy(config)
        for field, value in {**chosen, **fields}.items():
            setattr(candidate, field, value)
        try:
            remaining = _differences(model, candidate, structure)
        except (ValueError, StrictDataclassError):  # this family's config does not allow these numbers
            continue
        if remaining.items() < found.items():  # a proper part: it explains something and contradicts nothing
            found, chosen = remaining, {**chosen, **fields}
    for field, value in chosen.items():
        setattr(config, field, value)
    shapes = {name: value for (name, key), value in found.items() if key == "shape"}
    attributes: dict[str, dict] = {}
    for (name, key), value in found.items():
        if key != "shape":
            attributes.setdefault(name, {})[key] = value
    (mark if "layers" in structure else unmark)(model)
    write_part(config, "structure", structure | ({"shapes": shapes} if shapes else {})
               | ({"attributes": attributes} if attributes else {}))  # fmt: skip


def build_twin(model: nn.Module, config, structure: dict[str, Any]) -> nn.Module:
    """What `from_pretrained` would build from `config` for the class of `model`, on the meta device.

    Of `structure` it has the layers, with the shapes of the config.

    Raises ValueError or StrictDataclassError if the family does not allow the config.
    """
    config = type(config).from_dict(config.to_dict())  # checks the values, as loading does
    with torch.device("meta"):
        twin = type(model)(config)
    if "layers" in structure:
        place_layers(twin, structure["layers"])
    return twin


def _differences(model: nn.Module, config, structure: dict) -> dict[tuple[str, str], Any]:
    """(stored module name, "shape" or attribute) -> value in `model`, where the twin of `config` has another."""
    twin = dict(build_twin(model, config, structure).named_modules())
    found = {}
    for name, module in model.named_modules():
        other, stored = twin.get(name), stored_name(model, name)
        if other is None:
            continue  # within a layer that the loader replaces, e.g. by a low-rank pair
        if is_projection(module) and is_projection(other) and _shape(module) != _shape(other):
            found[stored, "shape"] = _shape(module)
        for attribute in (*ATTRIBUTES, *HEAD_DIM_NAMES):
            value = getattr(module, attribute, None)
            if _is_plain(value) and value != getattr(other, attribute, None):
                found[stored, attribute] = value
    return found


def _shape(module: nn.Module) -> list[int]:
    return [out_features(module), in_features(module)]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, list))


def _uniform_fields(model: nn.Module) -> Iterator[dict[str, int]]:
    """Config fields that might say what all layers have in common, to be tried one after the other."""
    try:
        parts = cuttable(model)
    except ValueError:  # only its tables can have changed
        return
    neurons = [{layer.feed_forward.num_neurons for layer in stack.layers} for stack in parts.stacks]
    if all(len(widths) == 1 for widths in neurons):
        for field in NEURON_FIELDS:
            if hasattr(model.config, field) and len(set.union(*neurons)) == 1:
                yield {field: min(neurons[0])}
        if len(neurons) == 2 and all(hasattr(model.config, field) for field in STACK_NEURON_FIELDS):
            yield {field: min(widths) for field, widths in zip(STACK_NEURON_FIELDS, neurons, strict=True)}
    heads = {(a.num_heads, a.num_key_value_heads, a.head_dim) for layer in parts.layers for a in layer.attentions}
    if len(heads) == 1 and min(heads)[0]:
        num_heads, num_key_value_heads, head_dim = min(heads)
        fields = {"num_attention_heads": num_heads}
        if not isinstance(getattr(type(model.config), "head_dim", None), property) and not hasattr(
            model.config, "d_kv"
        ):
            fields["head_dim"] = head_dim
        if hasattr(model.config, "num_key_value_heads"):
            fields["num_key_value_heads"] = num_key_value_heads
        yield fields
