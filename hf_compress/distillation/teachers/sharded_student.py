"""Losses on what lies inside a layer, for a student whose weights FSDP2 gathers layer by layer.

FSDP2 gathers a layer's weights for backward when a gradient reaches the layer's output. A loss on queries and keys of
the last layer reaches its inside alone, so there the weights are asked for.
"""

from collections.abc import Iterable

from torch import nn

from hf_compress.model.anatomy import anatomy


def gather_highest(student: nn.Module, layers: Iterable[int]) -> None:
    """Gather the weights of the highest of `layers` for the backward pass, after which FSDP2 lets go of them as usual.

    The layers below it lie on the way down from its queries. Does nothing where a layer is not sharded by itself.
    """
    layers = list(layers)
    if not layers:  # of a student of any kind
        return
    modules = [layer.module for layer in anatomy(student).layers]
    highest = modules[max(number % len(modules) for number in layers)]
    if hasattr(highest, "unshard"):
        highest.unshard()
