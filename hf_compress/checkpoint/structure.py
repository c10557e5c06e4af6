"""The `structure` part of the record: which shapes and attributes differ from what the config alone builds.

    {"shapes": {module: [out_features, in_features]}, "attributes": {module: {attribute: value}},
     "layers": {"config": {field: value}, "keep": {list of layers: [number, ...]}},
     "ranks": {module: rank}, "shared": {module: the module whose projection it reads}}

Everything is checked before it is used: names must be linear maps of the model, shapes must lie within what the config
builds, attributes are a closed list, and the result must be a model whose projections fit each other.
"""

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.factors import prepare_low_rank, prepare_shared, retie_low_rank
from hf_compress.checkpoint.fit import check_fit
from hf_compress.layers.low_rank import LowRank
from hf_compress.model.anatomy import in_features, is_projection, out_features
from hf_compress.model.cuttable import cuttable
from hf_compress.model.record import find_name
from hf_compress.surgery.depth import ATTRIBUTES, DEPTH_FIELDS, PER_LAYER_FIELDS, place_layers
from hf_compress.surgery.marks import expect_mark, marked_norm, take_mark
from hf_compress.surgery.position_bias import KEPT, place_kept_heads
from hf_compress.surgery.stand_ins import COUNTS_HEADS, HeadlessAttention, config_of_heads, linear_class

KEYS = ("shapes", "attributes", "layers", "ranks", "shared")
MOST_LAYERS = 1_000  # a deeper model is built, so a file must not ask for any number


def validate(part: dict[str, Any]) -> None:
    """Raises ValueError if the structure is not built as described above."""
    _check_keys(part, KEYS, "structure")
    for name, shape in _entries(part, "shapes"):
        if not (isinstance(shape, list) and len(shape) == 2 and all(_is_size(n) for n in shape)):
            raise ValueError(f"structure: the shape of {name!r} must be two sizes, got {shape!r}.")
    if "layers" in part:
        _validate_layers(dict(_entries(part, "layers")))
    for name, rank in _entries(part, "ranks"):
        if not (_is_size(rank) and rank):
            raise ValueError(f"structure: the rank of {name!r} must be at least 1, got {rank!r}.")
    for name, owner in _entries(part, "shared"):
        if not isinstance(owner, str):
            raise ValueError(f"structure: {name!r} must share with a module, by its name, got {owner!r}.")
    for name, attributes in _entries(part, "attributes"):
        if not isinstance(attributes, dict):
            raise ValueError(f"structure: the attributes of {name!r} must be a mapping, got {attributes!r}.")
        _check_keys(attributes, ATTRIBUTES, f"attributes of {name!r}")
        for attribute, value in attributes.items():
            is_list = (attribute == "split_size" and value == [0, 0, 0]) or (attribute == KEPT and _are_numbers(value))
            if not (is_list if isinstance(value, list) else attribute != KEPT and _is_size(value)):
                raise ValueError(f"structure: {attribute} of {name!r} must be a size, got {value!r}.")


def prepare(model: nn.Module, part: dict[str, Any]) -> None:
    """Changes `model`, which is on the meta device: gives its modules the recorded shapes and attributes.

    Raises ValueError for names, shapes and attributes that do not fit the model that the config builds.
    """
    if "layers" in part:
        place_layers(model, part["layers"])
    names = {name for name, _ in model.named_modules()}
    layers = cuttable(model).layers if "shapes" in part else ()
    of_layers = {module for layer in layers for module in layer.module.modules()}
    for stored, shape in _entries(part, "shapes"):
        name = _find(model, stored, names)
        if name is None:
            continue
        module = model.get_submodule(name)
        if not (is_projection(module) and module in of_layers):
            raise ValueError(f"structure: {stored!r} is no linear map of a layer, so its shape cannot be changed.")
        largest = [out_features(module), in_features(module)]
        if any(n > most for n, most in zip(shape, largest, strict=True)):
            raise ValueError(f"structure: {stored!r} has the shape {shape}, beyond the {largest} of the config.")
        resize(module, *shape)
    for stored, attributes in _entries(part, "attributes"):
        name = _find(model, stored, names)
        if name is None:
            continue
        module = model.get_submodule(name)
        if KEPT in attributes:
            place_kept_heads(model, name, attributes[KEPT])
        for attribute, value in attributes.items():
            if not hasattr(module, attribute):
                raise ValueError(f"structure: {stored!r}, a {type(module).__name__}, has no attribute {attribute!r}.")
            setattr(module, attribute, value)
    if "shapes" in part or "attributes" in part:
        fit_head_biases(model)
        check_fit(model)
    ranks = dict(_entries(part, "ranks"))
    of_tables = {ranks[n] for n in ranks if isinstance(_module(model, n, names), nn.Embedding)}
    for stored, rank in ranks.items():  # a head that was tied to a table may stay behind, in a model of another task
        if (name := _find(model, stored, names, may_lack=rank in of_tables)) is not None:
            prepare_low_rank(stored, model.get_submodule(name), rank)
    for stored, other in _entries(part, "shared"):
        if (name := _find(model, stored, names)) is not None:
            prepare_shared(stored, model.get_submodule(name), other, _module(model, other, names))
    if "ranks" in part:
        retie_low_rank(model)
    if "layers" in part:
        expect_mark(model)
    if "shapes" in part:
        _stand_in_for_heads(model)


def _stand_in_for_heads(model: nn.Module) -> None:
    for attention in [attention for layer in cuttable(model).layers for attention in layer.attentions]:
        if attention.num_heads == 0 and type(attention.module).__name__ in COUNTS_HEADS:
            model.set_submodule(attention.name, HeadlessAttention(attention.module))
        elif (config := config_of_heads(attention.module, attention.num_heads)) is not None:
            attention.module.config = config


def _validate_layers(layers: dict[str, Any]) -> None:
    _check_keys(layers, ("config", "keep"), "layers")
    if len(layers) < 2:
        raise ValueError(f"structure: the layers must have config and keep, got {sorted(layers)}.")
    fields = dict(_entries(layers, "config"))
    depth_fields = [name for names in DEPTH_FIELDS for name in names]
    _check_keys(fields, (*depth_fields, *PER_LAYER_FIELDS), "layers")
    for name, value in fields.items():
        is_depth = _is_size(value) and value <= MOST_LAYERS
        is_list = (
            isinstance(value, list) and len(value) <= MOST_LAYERS and all(isinstance(v, (str, int)) for v in value)
        )
        if not (is_depth if name in depth_fields else is_list):
            raise ValueError(f"structure: {name} of the layers must be a depth or a list per layer, got {value!r}.")
    for name, numbers in _entries(layers, "keep"):
        if not _are_numbers(numbers):
            raise ValueError(f"structure: the layers of {name!r} must be a list of different numbers, got {numbers!r}.")


def resize(module: nn.Linear | Conv1D, out_size: int, in_size: int) -> None:
    """Changes `module`: gives it an empty weight (out_size, in_size) and a bias to match."""
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, Conv1D):
        module.weight, module.nf, module.nx = nn.Parameter(torch.empty(in_size, out_size, **like)), out_size, in_size
    else:
        module.weight = nn.Parameter(torch.empty(out_size, in_size, **like))
        module.out_features, module.in_features = out_size, in_size
    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty(out_size, **like))
    module.__class__ = linear_class(module, in_size)


def fit_head_biases(model: nn.Module) -> None:
    """Changes `model`, which is on the meta device: biases that DeBERTa adds apart have a value for each row left."""
    for attention in (attention for layer in cuttable(model).layers for attention in layer.attentions):
        for name in attention.head_biases:
            old = attention.module._parameters[name]
            setattr(attention.module, name, nn.Parameter(old.new_empty(attention.num_heads * attention.head_dim)))


def finish(model: nn.Module, part: dict[str, Any]) -> None:
    """Changes `model`: its tensors are there, and from now on it says what is special of them when it is saved."""
    if "layers" in part:
        take_mark(model)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.is_loading = False


def sentinels(model: nn.Module, part: dict[str, Any]) -> list[str]:
    """Low-rank modules, and a marked norm, have something else where Transformers alone looks for `weight`."""
    names = [name for name, module in model.named_modules() if isinstance(module, LowRank)]
    return [f"{name}.weight" for name in (*names, *([marked_norm(model)[0]] if "layers" in part else ()))]


def check_tensors(model: nn.Module, part: dict[str, Any], files: list[str]) -> None:
    """Compare recorded shapes with the headers of the files. Raises ValueError where they contradict each other."""
    names = {name for name, _ in model.named_modules()}
    found = (find_name(model, stored, names) for stored in part.get("shapes", {}))
    modules = {name: model.get_submodule(name) for name in found if name}
    # those that another part of the record stores in another form are checked there
    expected = {f"{name}.weight": list(m.weight.shape) for name, m in modules.items() if "weight" in m._parameters}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys() & expected.keys()):
                shape = file.get_slice(key).get_shape()
                if shape != expected[key]:
                    raise ValueError(
                        f"structure: {key} has the shape {expected[key]} by the record, and {shape} in {path}. "
                        "The config and the weights are of two different models."
                    )


def _module(model: nn.Module, stored: str, names: set[str]) -> nn.Module | None:
    name = find_name(model, stored, names)
    return None if name is None else model.get_submodule(name)


def _find(model: nn.Module, stored: str, names: set[str], *, may_lack: bool = False) -> str | None:
    """The name of a recorded module; None if it belongs to a part that this class of the family does not have."""
    name = find_name(model, stored, names)
    architectures = getattr(model.config, "architectures", None) or [type(model).__name__]
    if name is None and not may_lack and type(model).__name__ in architectures:
        raise ValueError(f"structure: {type(model).__name__} has no module {stored!r}; the record is of another model.")
    return name


def _entries(part: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    entries = part.get(key, {})
    if not isinstance(entries, dict):
        raise ValueError(f"structure: {key} must be a mapping of module names, got {type(entries).__name__}.")
    return list(entries.items())


def _check_keys(mapping: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    if unknown := sorted(set(mapping) - set(known)):
        raise ValueError(f"{what}: unknown entries {unknown}; known are {', '.join(known)}.")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_size(i) for i in value) and len(set(value)) == len(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
