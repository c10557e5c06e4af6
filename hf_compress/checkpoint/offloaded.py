"""Weights that `device_map` left on disk come into memory when their turn comes, so that the model need not fit.

Transformers loads a model larger than memory with some layers on disk; accelerate's hooks read them for each forward
pass. Here a layer is read once, quantized, and stays in its packed form.
"""

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from hf_compress.layers.packed_module import PackedModule
from hf_compress.model.anatomy import anatomy, is_readable


@torch.no_grad()
def bring_in(module: nn.Module) -> None:
    """Changes `module`: what it and its submodules have on disk or in a host copy is theirs, without hooks."""
    for part in list(module.modules()):
        if not has_offloaded_params(part):
            continue
        with align_module_device(part):
            tensors = {name: tensor.detach() for name, tensor in part.named_parameters(recurse=False)}
            buffers = dict(part.named_buffers(recurse=False))
        remove_hook_from_module(part)
        for name, tensor in tensors.items():
            part.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for name, tensor in buffers.items():
            part.register_buffer(name, tensor, persistent=name not in part._non_persistent_buffers_set)


def check_offloaded(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the module, if anything else than layers is on disk: it takes part in every pass."""
    layers = anatomy(model).layers if is_readable(model) else ()
    inside = {part for layer in layers for part in layer.module.modules()}
    for name, part in model.named_modules():
        if part not in inside and any(tensor.is_meta for tensor in part.parameters(recurse=False)):
            raise ValueError(
                f"{name} is on disk, but GPTQ needs all but the layers in memory: name it in `device_map` as 'cpu' or "
                "a device, and let only layers be 'disk'."
            )


def finish_offloaded(model: PreTrainedModel) -> None:
    """Changes `model`: the rest of each quantized layer comes too. With nothing left on disk, it is an ordinary one."""
    if getattr(model, "hf_device_map", None) is None:
        return
    for layer in anatomy(model).layers:
        if any(isinstance(part, PackedModule) for part in layer.module.modules()):
            bring_in(layer.module)
    if not any(tensor.is_meta for tensor in model.state_dict().values()):
        del model.hf_device_map
