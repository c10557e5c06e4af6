"""Keys of examples: a hash of what a model reads of them, the same in any batch, order and padding.

The key of an example is 64 bits over its input columns: each real token is hashed with its place among the real tokens
and the column's name, and the hashes are summed. It is computed on the batch, on its device, in a few passes over
(B, T) integers, so that no identifier has to travel with the data. Two of n examples collide with a chance of about
n^2 / 2^65: one in a million for six million examples.
"""

import zlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

MASKS = ("attention_mask", "decoder_attention_mask")
# What a stored tensor has one row of: an example, a token of a side, or a different class among a token's draws.
Side = Literal["example", "input", "decoder", "draw"]

# The constants of splitmix64 (Steele et al., 2014), as signed integers.
GOLDEN, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def real_tokens(inputs: Mapping[str, Tensor], side: Side) -> Tensor | None:
    """True where `side` of a batch has a real token, (B, T); None where it has no tokens (pixels)."""
    if side == "decoder":
        tokens, labels = inputs.get("decoder_input_ids"), inputs.get("labels")
        if tokens is not None and labels is not None and labels.shape == tokens.shape:
            return labels != -100
        mask = inputs.get("decoder_attention_mask")
    else:
        tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if tokens is None:
        return None
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"Examples are told apart by their real tokens: the attention mask must be as large as the tokens, got "
            f"{tuple(mask.shape)} for tokens of {tuple(tokens.shape)}. Use padded batches with one row an example."
        )
    return mask.bool()


def example_keys(inputs: Mapping[str, Tensor], columns: Iterable[str]) -> Tensor:
    """The keys of a batch, (B,) int64, from `columns` of it; masks say which tokens are padding and do not count."""
    masks = {side: real_tokens(inputs, side) for side in ("input", "decoder")}
    keys = 0
    for column in columns:
        values = inputs[column]
        if values.is_floating_point():
            values = values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
        mask = masks["decoder" if column.startswith("decoder_") else "input"]
        if mask is None or mask.shape != values.shape:
            values = values.reshape(len(values), -1)
            places = torch.arange(values.shape[1], device=values.device)
            mask = torch.ones_like(places, dtype=torch.bool)
        else:
            places = mask.cumsum(dim=-1)  # left and right padding alike
            if values.dim() == 3:  # (B, C, T), of choices: a token of another choice is another token
                places = places + (torch.arange(values.shape[1], device=values.device) << 32)[:, None]
            values, mask, places = (one.flatten(1) for one in (values, mask, places))
        hashes = mix(mix(values.long() + zlib.crc32(column.encode())) + places * GOLDEN)  # (B, T)
        keys = keys + (hashes * mask).sum(dim=1)
    return mix(keys)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: every bit of the result depends on every bit of `x` (int64, wraps around)."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
