"""Weights that FSDP2 cuts over the ranks: what this rank holds of them between two passes, and all of them again.

Inside a forward pass a weight is whole. Between passes it is a `DTensor`, of which a rank has some of the rows. Each
function here takes plain tensors and models as well, and leaves them as they are; those that gather or sum have to be
called by all ranks, in the same order.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

REDUCTIONS = {"sum": "SUM", "amax": "MAX"}


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def check_shards(model: nn.Module, what: str) -> None:
    """Raise ValueError for weights that are cut otherwise than by FSDP2, which alone gives each rank whole rows."""
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            f"{what} while training reads and changes weights between steps, and ZeRO-3 keeps them in buffers of its "
            "own. Train with FSDP2 (fsdp_version: 2), with DDP or on one device."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            f"{what} while training works on matrices, and FSDP1 makes one long row of all weights of a layer. Train "
            "with FSDP2 (fsdp_version: 2), with DDP or on one device."
        )
    cuts = [sum(not place.is_replicate() for place in p.placements) if is_sharded(p) else 0 for p in parameters]
    if max(cuts, default=0) > 1 or len(set(cuts)) > 1:
        raise ValueError(
            f"{what} while training works on weights that are cut over the ranks in one direction, all of them or "
            "none: here FSDP is combined with tensor parallelism, or leaves modules out. Train with FSDP2 alone."
        )


def check_loading(plugin: Any, who: str) -> None:
    """Raise ValueError where Accelerate gives only rank 0 the weights: here all ranks read them before they train."""
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        raise ValueError(
            f"{who} reads the weights of its models on every rank before training begins, and with "
            "cpu_ram_efficient_loading only rank 0 has them. Set it to false: accelerate launch "
            "--fsdp_cpu_ram_efficient_loading false, or in fsdp_config."
        )


def own(tensor: Tensor) -> Tensor:
    """What this rank holds, a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def part(tensor: Tensor, dim: int) -> slice:
    """The places along `dim` that this rank holds."""
    size = tensor.shape[dim]
    for number, place in enumerate(getattr(tensor, "placements", ())):
        if place.is_shard(dim):
            step = -(-size // tensor.device_mesh.size(number))  # as torch.chunk cuts
            start = min(step * tensor.device_mesh.get_local_rank(number), size)
            return slice(start, min(start + step, size))
    return slice(0, size)


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered; the same on all ranks."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which all ranks have whole and is shaped as `like`, cut as that is: each rank keeps its part."""
    if not is_sharded(like):
        return value
    return as_part(value[tuple(part(like, dim) for dim in range(like.dim()))].clone(), like)


def as_part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is shaped and cut as `like`; itself where that is whole."""
    if not is_sharded(like):
        return value
    stride = torch.empty(like.shape, device="meta").stride()
    return type(like.data).from_local(
        value.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
    )


@torch.no_grad()
def write_(tensor: Tensor, value: Tensor) -> None:
    """Put `value`, which all ranks have whole, into `tensor`; each rank writes its part."""
    own(tensor).copy_(value[tuple(part(tensor, dim) for dim in range(tensor.dim()))])


def over_ranks(value: Tensor, like: Tensor, reduction: str = "sum") -> Tensor:
    """`value` of each rank, summed in place (or the largest, `amax`) over the ranks that share the tensor `like`."""
    for number, place in enumerate(getattr(like, "placements", ())):
        if place.is_shard():
            operation = getattr(dist.ReduceOp, REDUCTIONS[reduction])
            dist.all_reduce(value, operation, group=like.device_mesh.get_group(number))
    return value


def put_away(model: nn.Module) -> None:
    """Changes `model`: weights that an evaluation left whole are in parts again, to which what is written stays."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def make_whole(model: nn.Module, later: Iterable[nn.Module] = ()) -> None:
    """Changes `model`: no longer FSDP2's, with weights that are whole, gathered one by one.

    Those of the modules `later` stay in parts, for `whole` to gather when their turn comes.
    """
    put_away(model)
    later, gathered = set(later), {}
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            _leave_fsdp(module)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_sharded(parameter) or (name == "weight" and module in later):
                continue
            if parameter not in gathered:  # tied weights stay tied
                gathered[parameter] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
            module._parameters[name] = gathered[parameter]


def _leave_fsdp(module: nn.Module) -> None:
    """Take off what `fully_shard` put on a module: PyTorch has no function for that."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY  # only under FSDP
    from torch.distributed._composable_state import _module_state_mapping

    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    module.__class__ = type(module).__mro__[2]  # FSDPBertLayer, FSDPModule, BertLayer
    for key in (STATE_KEY, REGISTRY_KEY, "generate"):  # Trainer lets `generate` gather the weights
        vars(module).pop(key, None)
    _module_state_mapping.pop(module, None)
