"""The slow, obvious reference of surgery: the whole model, with heads and neurons silenced by hooks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from helpers import tiny_batch
from torch import Tensor, nn

from hf_compress.model.anatomy import anatomy


def logits(model: nn.Module, batch: dict | None = None) -> Tensor:
    batch = tiny_batch(model) if batch is None else batch
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}).logits


@contextmanager
def silenced(
    model: nn.Module,
    *,
    heads: Mapping[int, Iterable[int]] | None = None,
    neurons: Mapping[int, Iterable[int]] | None = None,
) -> Iterator[None]:
    """While open, these heads and neurons pass on zeros. Numbers as in `prune_heads` and `prune_neurons`."""
    parts = anatomy(model)
    targets = [(parts.attentions[i].output, gone, parts.attentions[i].head_dim) for i, gone in (heads or {}).items()]
    targets += [(parts.layers[i].feed_forward.output, gone, 1) for i, gone in (neurons or {}).items()]

    def silence(gone: Iterable[int], width: int):
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].unflatten(-1, (-1, width)).clone()
            x[..., list(gone), :] = 0
            return (x.flatten(-2),)

        return hook

    handles = [module.register_forward_pre_hook(silence(gone, width)) for module, gone, width in targets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
