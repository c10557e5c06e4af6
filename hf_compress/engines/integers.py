"""The stored tensors of a packed weight, and what they stand for."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.engines.ops import unpack_gptq, unpack_rows, unpack_zeros


class Stored(NamedTuple):
    """A weight (N, K) as its layer stores it.

    by_rows False: GPTQ's layout, qweight (K * bits / 32, N), scales (G, N), zeros packed along N or None, g_idx or None
    by_rows True:  a table's, qweight (N, K * bits / 32), scales (N, G), zeros (N, G) or None
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    bits: int
    out_features: int
    in_features: int
    by_rows: bool

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1 if self.by_rows else 0]


class Integers(NamedTuple):
    """q (N, K) uint8 in [0, 2^bits - 1]; scales, zeros (N, G) float32; perm (K,) brings columns of a group together."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The weight (N, K) in float32, its columns in the layer's order."""
        centred = self.q.unflatten(1, (self.scales.shape[1], -1)) - self.zeros[..., None]  # (N, G, g)
        weight = (centred * self.scales[..., None]).flatten(1)
        return weight if self.perm is None else torch.empty_like(weight).index_copy_(1, self.perm, weight)


def integers(stored: Stored) -> Integers:
    """Raises ValueError for act-order groups of unequal size."""
    bits, K, G = stored.bits, stored.in_features, stored.num_groups
    if stored.by_rows:
        q, scales = unpack_rows(stored.qweight, bits, K), stored.scales
        zeros = stored.zeros
    else:
        q, scales = unpack_gptq(stored.qweight, bits, K), stored.scales.t()
        zeros = None if stored.zeros is None else unpack_zeros(stored.zeros, bits, stored.out_features).t()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros
    perm = None
    if stored.g_idx is not None:
        if bool((torch.bincount(stored.g_idx.long(), minlength=G) != K // G).any()):
            raise ValueError("The groups of this act-order weight differ in size.")
        perm = torch.argsort(stored.g_idx, stable=True)
        q = q[:, perm]
    return Integers(q, scales.float().contiguous(), zeros.float().contiguous(), perm, bits)


def dequantize(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in `dtype`, without a look at the values: usable inside a compiled graph."""
    bits, K = stored.bits, stored.in_features
    if stored.by_rows:
        q, scales = unpack_rows(stored.qweight, bits, K), stored.scales.float()
        zeros = 2.0 ** (bits - 1) if stored.zeros is None else stored.zeros.float()[..., None]
        return ((q.unflatten(1, (scales.shape[1], -1)) - zeros) * scales[..., None]).flatten(1).to(dtype)
    q, scales = unpack_gptq(stored.qweight, bits, K), stored.scales.float()
    G = len(scales)
    groups = stored.g_idx.long() if stored.g_idx is not None else torch.arange(K, device=q.device) // (K // G)
    if stored.zeros is None:
        return ((q.float() - 2.0 ** (bits - 1)) * scales[groups].t()).to(dtype)
    zeros = unpack_zeros(stored.zeros, bits, stored.out_features).float()
    return ((q - zeros[groups].t()) * scales[groups].t()).to(dtype)
