"""A packed weight under its name, as arrays: what files for other runtimes are written from."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from hf_compress.checkpoint.bits import packed_modules
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme


@dataclass(frozen=True)
class NamedWeight:
    """w[n, k] = scales[n, g] * (q[n, k] - zeros[n, g]), g = k // (K / G): groups are neighbouring columns here.

    q       (N, K) uint8, (V, D) of an embedding table
    scales  (N, G) float16 or float32, as stored
    zeros   (N, G) uint8
    order   (K,) int64, where act-order sorted the columns: column k multiplies input order[k]; None where it did not
    """

    name: str
    q: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray | None
    scheme: WeightScheme
    is_table: bool

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.num_groups

    @property
    def is_int8(self) -> bool:
        """8 bit, symmetric, one scale a row: what products of integers take."""
        return self.scheme.bits == 8 and self.scheme.symmetric and self.num_groups == 1

    def signed(self) -> np.ndarray:
        """q - zero (N, K), int16."""
        return self.q.astype(np.int16) - np.repeat(self.zeros.astype(np.int16), self.group_size, axis=1)


def named_weights(model: nn.Module, *, act_order: bool = True) -> Iterator[NamedWeight]:
    """Those of `model`, one at a time. Raises ValueError, naming the module, for codebooks and unequal groups."""
    for name, module in packed_modules(model):
        if module.scheme.num_levels is not None:
            raise ValueError(f"{name} has a codebook, which this format has no place for. Export as 'plain'.")
        if module.scheme.desc_act and not act_order:
            raise ValueError(
                f"{name}: groups must be neighbouring columns in this format. Quantize with desc_act=False, or export "
                "as 'plain'."
            )
        yield named_weight(name, module)


def named_weight(name: str, module: PackedLinear | PackedEmbedding) -> NamedWeight:
    weight, order = module.packed_weight(), None
    q, scales, zeros = (part.cpu().numpy() for part in (weight.q, weight.scales, weight.zeros))
    if weight.g_idx is not None:
        groups = weight.groups.cpu().numpy()
        sizes = np.bincount(groups, minlength=scales.shape[1])
        if (sizes != sizes[0]).any():
            raise ValueError(f"{name}: act-order groups must be of one size, got {sorted(set(sizes.tolist()))}.")
        order = np.argsort(groups, kind="stable")
        q = q[:, order]
    return NamedWeight(name, q, scales, zeros, order, module.scheme, isinstance(module, PackedEmbedding))
