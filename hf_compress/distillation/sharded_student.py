"""Losses on what lies inside a layer, for a student whose weights FSDP2 gathers layer by layer.

FSDP2 gathers a layer's weights for backward when a gradient reaches the layer's output. A loss on queries and keys of
the last layer reaches its inside alone, so a gradient of zero is sent through its output as well.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hf_compress.anatomy import anatomy


@contextmanager
def output_of_highest(student: nn.Module, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """While open, the output states of the highest of `layers`, of the running forward; the list is empty for none.

    The layers below lie on the way from its queries down, so it alone needs more.
    """
    modules = [layer.module for layer in anatomy(student).layers]
    highest = max((number % len(modules) for number in layers), default=None)
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        seen[:] = [output[0] if isinstance(output, tuple) else output]

    handle = None if highest is None else modules[highest].register_forward_hook(note)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()
