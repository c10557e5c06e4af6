"""Which positions of a batch are tokens, and which only fill it up."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.model.anatomy import Anatomy


def decoder_layers(parts: Anatomy) -> set[int]:
    """The layers of an encoder-decoder's decoder, numbered as in `parts.layers`; empty for models of one stack."""
    first = len(parts.stacks[0].layers)
    return set(range(first, len(parts.layers))) if len(parts.stacks) > 1 else set()


def real_tokens(batch: Mapping[str, Tensor], states: Tensor, *, is_decoder: bool) -> Tensor:
    """(B, T) True where `states` (B, T, ...) belong to a token; everywhere if the batch has no mask for them.

    `is_decoder` is for the decoder of an encoder-decoder, whose tokens have a mask of their own.
    """
    mask = batch.get("decoder_attention_mask" if is_decoder else "attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.bool()


def by_example(x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """x as (B, T, D), also where a layer works on (B * T, D), as OPT's; `shape` (B, T) is that of the batch's text."""
    is_flat = x.dim() == 2 and shape is not None and len(x) == math.prod(shape)
    return x.unflatten(0, shape) if is_flat else x
