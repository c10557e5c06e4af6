"""What the files of a checkpoint hold, compared with the model that waits for it: before and after they are read.

Before: names, kinds of number and shapes, from the headers alone, so that no size is believed that the file does not
have. After: no tensor is left that no file filled, none holds NaN or infinity.
"""

import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_compress.layers.packed_module import PackedModule
from hf_compress.layers.sentinel import Sentinel

EXACT = ("qweight", "qblocks", "qzeros", "zeros")  # words whose width is part of their meaning
INDEX_DTYPES = ("I32", "I64")
DTYPES = {torch.int32: "I32", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


class Stored(NamedTuple):
    """A tensor as the header of a file announces it."""

    file: str
    dtype: str
    shape: list[int]


def read_headers(files: list[str]) -> dict[str, Stored]:
    """Every tensor of the files by its name. Raises ValueError, naming the file, for one that is no safetensors."""
    found, folders = {}, {Path(path).parent for path in files}
    for folder in folders:
        if len(folders) > 1 or (folder.name == ".." and not (folder / "config.json").is_file()):
            raise ValueError(f"The index of a checkpoint names files outside its folder: {', '.join(map(str, files))}.")
    for path in map(str, files):
        if not path.endswith(".safetensors"):
            raise ValueError(f"A compressed checkpoint is read from safetensors files only, got {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no mapping
                    part = file.get_slice(key)
                    found[key] = Stored(path, part.get_dtype(), part.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}.") from error
    return found


def check_headers(model: nn.Module, stored: dict[str, Stored], sentinels: Collection[str]) -> None:
    """Raise ValueError, naming tensor and file, where the files hold something else than the model waits for."""
    for name, tensor in model.state_dict().items():
        found = stored_as(model, name, stored)
        if found is None or name in sentinels:
            continue
        module, part = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        is_own = isinstance(module, (PackedModule, Sentinel))
        if (is_own or _is_backbone(model, name)) and found.shape != list(tensor.shape):
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)} by config.json, and {found.shape} in {found.file}: "
                "the two are of different models, or damaged."
            )
        if is_own and part in (*EXACT, getattr(module, "KEPT", None)):
            fits = found.dtype == DTYPES[tensor.dtype]
        elif is_own and not tensor.is_floating_point():
            fits = found.dtype in INDEX_DTYPES
        else:
            fits = tensor.is_floating_point() == found.dtype.startswith(("F", "BF"))
        if not fits:
            raise ValueError(f"{name} must hold {tensor.dtype}, but is {found.dtype} in {found.file}: it is damaged.")
    if left := unexplained(model, stored, sentinels):
        raise ValueError(
            f"{left[0]} in {stored[left[0]].file} is nothing that config.json speaks of ({len(left)} such tensors): "
            "the two are of different models, or damaged."
        )


def check_sentinels(model: nn.Module, stored: dict[str, Stored], sentinels: Collection[str]) -> None:
    """Raise ValueError for a sentinel that is not as it is saved: no value or one, in float32."""
    for name in sentinels:
        found = stored_as(model, name, stored)
        if found is not None and (found.dtype != "F32" or found.shape not in ([0], [1])):
            raise ValueError(
                f"{name} must hold nothing, but is {found.dtype} {found.shape} in {found.file}: its weight is stored "
                "under other names. The file is damaged, or of another model."
            )


def unexplained(model: nn.Module, stored: dict[str, Stored], sentinels: Collection[str]) -> list[str]:
    """Tensors of the files that `model` has no place for: all of them, but for another task's head."""
    expected = {*model.state_dict(), *sentinels, *getattr(model, "all_tied_weights_keys", {})}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    own = {name for name, module in model.named_modules() if isinstance(module, (PackedModule, Sentinel))}
    is_whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    is_renamed = bool(get_model_conversion_mapping(model, add_legacy=False))  # names in files may be others
    children = {name for name, _ in model.base_model.named_children()}
    left = []
    for key in stored:
        prefix = f"{model.base_model_prefix}."
        names = (key, key.removeprefix(prefix), prefix + key)
        if not expected.isdisjoint(names) or any(pattern.search(key) for pattern in ignored):
            continue
        is_of_ours = any(name.rpartition(".")[0] in own for name in names)
        is_of_backbone = names[1].partition(".")[0] in children
        if is_of_ours or (not is_renamed and (is_whole or is_of_backbone)):
            left.append(key)
    return left


def check_loaded(model: nn.Module, stored: dict[str, Stored], sentinels: Collection[str]) -> None:
    """Raise ValueError, naming the tensor, for one that no file filled or that holds NaN or infinity.

    What another task's class adds (a new head, a pooler) may be new, as with any checkpoint; so may the pooler of a
    backbone that was saved without one, and what no file of the family ever has (the positions of Marian).
    """
    pooler, never_saved = _new_pooler(model, stored), set(model._keys_to_ignore_on_save or ())
    is_whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    own = [name for name, module in model.named_modules() if isinstance(module, (PackedModule, Sentinel))]
    for name, tensor in model.state_dict().items():
        if name in sentinels or tensor.is_meta or _tensor(model, name) is None or name.startswith(pooler):
            continue
        is_new = not getattr(_tensor(model, name), "_is_hf_initialized", False)
        is_resized = stored_as(model, name, stored) is not None  # with ignore_mismatched_sizes
        is_needed = name.rpartition(".")[0] in own or (is_whole and not is_resized and name not in never_saved)
        if is_new and is_needed and name not in getattr(model, "all_tied_weights_keys", {}):
            raise ValueError(f"{name} is in none of the checkpoint's files: it is damaged, or of another model.")
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{name} holds NaN or infinity: the file is damaged, or the training had diverged.")


def _new_pooler(model: nn.Module, stored: dict[str, Stored]) -> tuple[str, ...]:
    """The prefix of a pooler that its class can do without, and of which the files hold nothing; else no prefix."""
    for name, module in model.named_modules():
        is_optional = "add_pooling_layer" in inspect.signature(type(module).__init__).parameters
        if is_optional and getattr(module, "pooler", None) is not None:
            prefix = f"{name}.pooler.".removeprefix(".")
            inside = [key for key in model.state_dict() if key.startswith(prefix)]
            return () if any(stored_as(model, key, stored) for key in inside) else (prefix,)
    return ()


def stored_as(model: nn.Module, name: str, stored: Mapping[str, Any]) -> Any | None:
    """What the files hold for the tensor `name` of `model`: with or without the base model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return next((stored[key] for key in (name, name.removeprefix(prefix), prefix + name) if key in stored), None)


def _is_backbone(model: nn.Module, name: str) -> bool:
    base = getattr(model, "base_model", model)
    return base is model or name.startswith(f"{model.base_model_prefix}.")


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer itself: a state dict holds detached copies."""
    module, _, part = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = owner._parameters.get(part)
    return owner._buffers.get(part) if parameter is None else parameter


def check_shapes(model: nn.Module, expected: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for a parameter that took the shape of the file, as Transformers 5.17 lets it."""
    for name, parameter in model.named_parameters():
        if parameter.shape != expected.get(name, parameter.shape):
            raise ValueError(
                f"{name} is {tuple(parameter.shape)} in the file and {tuple(expected[name])} in the model asked for, "
                f"and Transformers {transformers.__version__} cannot make it anew in a compressed model. Update "
                "Transformers, or load the model as it is and replace its head."
            )
