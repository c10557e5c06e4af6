"""What a packed weight is: the tensors that a layer stores, and the numbers that they stand for."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.engines.ops import unpack_rows, unpack_zeros


@dataclass(frozen=True)
class PackedWeight:
    """w[n, k] = scales[n, g] * (q[n, k] - zeros[n, g]) with g = groups[k]: what layers, routes and exporters read.

    q       (N, K)          uint8 in [0, 2^bits - 1], columns in the layer's order; (V, D) of a table
    scales  (N, G)          float16 or float32, as stored
    zeros   (N, G)          uint8
    g_idx   (K,) or None    group of each column, where groups are not neighbours
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    bits: int

    @property
    def groups(self) -> Tensor:
        """The group of each column, (K,) int64."""
        K, G = self.q.shape[1], self.scales.shape[1]
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(K, device=self.q.device) // (K // G)

    def signed(self) -> Tensor:
        """q less its zero point, (N, K) int16."""
        return self.q.short() - self.zeros.short()[:, self.groups]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K), computed in float32 and then cast: in float64, the same values."""
        scales, zeros = self.scales.float(), self.zeros.float()
        if self.g_idx is None:
            weight = self.q.float()
            grouped = weight.unflatten(1, (scales.shape[1], -1))  # (N, G, g)
            grouped.sub_(zeros[..., None]).mul_(scales[..., None])
        else:
            weight = (self.q.float() - zeros[:, self.groups]).mul_(scales[:, self.groups])
        return weight.to(dtype)


class Stored(NamedTuple):
    """A weight (N, K) as its layer stores it.

    by_rows False: GPTQ's layout, words (K * bits / 32, N), scales (G, N), zeros packed along N or None, g_idx or None
    by_rows True:  a table's, words (N, K * bits / 32), scales (N, G), zeros (N, G) or None
    """

    words: Tensor | None  # None where only a layout of the kernels holds them
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    bits: int
    in_features: int
    by_rows: bool

    @property
    def out_features(self) -> int:
        return self.scales.shape[0 if self.by_rows else 1]

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1 if self.by_rows else 0]

    @property
    def group_size(self) -> int:
        return self.in_features // self.num_groups

    @property
    def is_8_bit_rows(self) -> bool:
        return self.bits == 8 and self.num_groups == 1

    def turned(self) -> "Stored":
        """The same weight as a table stores it, over the same words: its rows are quicker to come by."""
        if self.by_rows:
            return self
        zeros = None if self.zeros is None else unpack_zeros(self.zeros, self.bits, self.out_features).t()
        words = None if self.words is None else self.words.t()
        return self._replace(words=words, scales=self.scales.t(), zeros=zeros, by_rows=True)

    def weight(self, rows: slice | None = None) -> PackedWeight:
        """The numbers of some rows (outputs), by default all of them."""
        words, scales, zeros = self.turned()[:3]
        if rows is not None:
            words, scales, zeros = words[rows], scales[rows], None if zeros is None else zeros[rows]
        return self._weight(unpack_rows(words, self.bits, self.in_features), scales, zeros)

    def weight_of(self, q: Tensor) -> PackedWeight:
        """The numbers with the integers q (N, K), which the words need not be read for."""
        return self._weight(q, *self.turned()[1:3])

    def _weight(self, q: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        if zeros is None:
            zeros = torch.full_like(scales, 2 ** (self.bits - 1), dtype=torch.uint8)
        return PackedWeight(q, scales, zeros, self.g_idx, self.bits)
