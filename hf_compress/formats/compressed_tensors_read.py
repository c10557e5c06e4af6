"""Opens compressed-tensors checkpoints, as llm-compressor and others write them, on our layers.

config.json says in `config_groups` which modules are stored how; `compressed_tensors_modules` reads their tensors.
Format and configuration: https://github.com/vllm-project/compressed-tensors
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from hf_compress.checkpoint.tensors import read_headers, stored_as, unexplained
from hf_compress.formats.compressed_tensors_modules import PACKED, UNPACKED, convert_module
from hf_compress.formats.foreign import find_folder, matches, model_class, telling
from hf_compress.layers.scheme import check_bits
from hf_compress.model.record import QUANT_METHOD, VERSION, find_name, stored_name

METHOD = "compressed-tensors"


def load_compressed_tensors(folder_or_id: str | Path, **kwargs) -> PreTrainedModel:
    """Someone else's compressed-tensors checkpoint on our layers: integers of 2, 3, 4 and 8 bit.

    folder_or_id: a folder, or the name of a repository on the Hub. kwargs go to `from_pretrained`. The result is a
    model like any that `quantize` returns: it saves in our own format and can be exported.

    Read are the formats pack-quantized and int-quantized: one scale a tensor, row or group, symmetric or not,
    act-order, and 8-bit inputs with a calibrated range or each token's own (whose largest value is 127 here, 127.5 in
    compressed-tensors). Raises ValueError, naming format and module, for everything else and for tensors that do not
    fit together.
    """
    folder = find_folder(folder_or_id)
    with telling(folder):
        config = AutoConfig.from_pretrained(folder)
    settings = _settings(config, folder)
    kind = model_class(config, folder)
    with telling(folder), torch.device("meta"):
        empty = kind(config)
    state = _tensors(folder)
    names = sorted({key.rpartition(".")[0] for key in state if key.endswith((".weight_packed", ".weight_scale"))})
    if not names:
        raise ValueError(
            f"{folder} holds no packed weight (format {settings.get('format')!r}): load it with Transformers."
        )
    _check_scales(state)
    bits = {}
    for name in names:
        own_name = find_name(empty, stored_name(empty, name))
        module = None if own_name is None else empty.get_submodule(own_name)
        if type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
            raise ValueError(f"{name} is packed in the file; in {kind.__name__} it is a {type(module).__name__}.")
        group = _group_of(own_name, module, settings)
        bits[stored_name(empty, name)] = convert_module(name, module, group, state).to_dict()
    _check_kinds(empty, state)
    config.quantization_config = {"quant_method": QUANT_METHOD, "version": VERSION, "bits": bits}
    with telling(folder):
        model = kind.from_pretrained(None, config=config, state_dict=state, **kwargs)
    if left := unexplained(model, state, ()):
        raise ValueError(f"{folder} holds {left[0]!r}, of which its config says nothing ({len(left)} such tensors).")
    model.config.name_or_path = str(folder_or_id)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _settings(config: PretrainedConfig, folder: Path) -> dict:
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} was quantized by {settings.get('quant_method')!r}; load_compressed_tensors reads {METHOD!r}."
        )
    sparsity = _mapping(settings, "sparsity_config").get("format", "dense")
    unread = {
        "kv_cache_scheme": settings.get("kv_cache_scheme"),
        "transform_config": _mapping(settings, "transform_config").get("config_groups"),
        "sparsity_config": None if sparsity == "dense" else sparsity,
        "moe_sparsity_config": settings.get("moe_sparsity_config"),
    }
    for key, value in unread.items():
        if value:
            raise ValueError(f"{folder} has a {key}, which is not read: {value!r}. Load it with Transformers.")
    return settings


def _mapping(settings: dict, name: str) -> dict:
    """An entry that is a mapping or not there. Raises ValueError for anything else."""
    value = settings.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return value or {}


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(map(str, folder.glob("*.safetensors")))
    state, headers = {}, read_headers(files)
    for path in files:
        with safe_open(path, "pt") as file:
            state |= {name: file.get_tensor(name) for name, header in headers.items() if header.file == path}
    return state


def _check_kinds(empty: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Raise ValueError, naming it, for a tensor that is not packed and whose numbers are not of the model's kind."""
    for name, expected in empty.state_dict().items():
        found = stored_as(empty, name, state)
        if found is not None and found.is_floating_point() != expected.is_floating_point():
            raise ValueError(f"{name} must hold {expected.dtype}, but is {found.dtype} in the file: it is damaged.")


def _check_scales(state: dict[str, Tensor]) -> None:
    """Raise ValueError for scales of both kinds of 16 bits: the bytes of one, read as the other, are other numbers."""
    scales = {name: tensor.dtype for name, tensor in state.items() if name.endswith(".weight_scale")}
    kinds = [dtype for dtype in scales.values() if dtype in (torch.float16, torch.bfloat16)]
    rare = min(set(kinds), key=kinds.count, default=None)
    if len(set(kinds)) > 1:
        odd = next(name for name, dtype in scales.items() if dtype == rare)
        raise ValueError(f"{odd} is {rare} in the file, others are of the other kind of 16 bits: it is damaged.")


def _group_of(name: str, module: nn.Module, settings: dict) -> dict:
    """The entry of `config_groups` that says how `name` is stored: by exact name, else by pattern, else by class."""
    groups = _mapping(settings, "config_groups")
    if not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"config_groups must spell their schemes out, got {groups!r}.")
    targets = {}
    for group in groups.values():
        if not isinstance(group.get("targets"), list) or not all(isinstance(t, str) for t in group["targets"]):
            raise ValueError(f"config_groups must have targets, a list of names, got {group.get('targets')!r}.")
        targets |= dict.fromkeys(group["targets"], group)
    patterns = sorted(target for target in targets if target.startswith("re:"))
    found = [name] + [target for target in patterns if matches(target.removeprefix("re:"), name)]
    found = [target for target in (*found, *(kind.__name__ for kind in type(module).__mro__)) if target in targets]
    if not found:
        raise ValueError(f"{name} is packed in the file, but none of the targets {sorted(targets)} means it.")
    group = targets[found[0]]
    weights, layout = _mapping(group, "weights"), group.get("format") or settings.get("format")
    _mapping(group, "input_activations")
    strategy, width = weights.get("strategy"), weights.get("num_bits")
    if layout not in (PACKED, *UNPACKED) or weights.get("type") != "int":
        raise ValueError(
            f"{name}: the format {layout!r} with {weights.get('type')!r} weights is not read; known are {PACKED!r} and "
            f"{UNPACKED[0]!r} with 'int'."
        )
    if strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"{name}: the strategy {strategy!r} is not read; known are 'tensor', 'channel' and 'group'.")
    try:
        check_bits(width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if group.get("output_activations"):
        raise ValueError(f"{name}: quantized outputs (output_activations) are not read.")
    return {**group, "format": layout}
