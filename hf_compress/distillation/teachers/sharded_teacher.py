"""A teacher cut over the processes, for one that does not fit on each; and what a loss needs whole of a cut model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hf_compress.model.anatomy import anatomy


def shard(teacher: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Give each process of `mesh` (all, by default) its part of every weight, gathered layer by layer in a forward.

    FSDP2, a group for each transformer layer and one for the rest. Every process has to run each forward, at the same
    time. Changes `teacher` and returns it.
    """
    for stack in anatomy(teacher).stacks:
        for layer in stack.modules:
            fully_shard(layer, mesh=mesh)
    return fully_shard(teacher, mesh=mesh, reshard_after_forward=True)  # there is no backward to keep weights for


@contextmanager
def gathered(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """While open, and after it with `keep`, each process holds whole what lies outside the layers: head and tables.

    All processes have to open it at the same time. Does nothing for a model that is not sharded by FSDP2.
    """
    is_sharded = hasattr(model, "unshard")
    if is_sharded:
        model.unshard()
    try:
        yield
    finally:
        if is_sharded and not keep:
            model.reshard()
