"""Random layers and the float64 products that every body of an operator is compared with."""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hf_compress_kernels.dispatch import INTERPRET
from torch import Tensor

# Frobenius norm of the error over that of the product. The accumulators are float32; what is left is the cast.
BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6, torch.float64: 1e-12}


class Layer(NamedTuple):
    ints: Tensor  # (N, K)
    scales: Tensor  # (G, N)
    zeros: Tensor  # (G, N)
    g_idx: Tensor  # (K,)
    bias: Tensor  # (N,)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """scale * (q - zero) in float64, with the scales as `dtype` holds them."""
        scales = self.scales.to(dtype).double()[self.g_idx].T
        return (self.ints.double() - self.zeros.double()[self.g_idx].T) * scales


def random_layer(bits: int, N: int, K: int, group_size: int = -1, act_order: bool = False, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    g = K if group_size == -1 else group_size
    G = -(-K // g)
    g_idx = torch.arange(K) // g
    if act_order:
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    return Layer(
        ints=torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8),
        scales=torch.rand(G, N, generator=generator) * 0.02 + 0.001,
        zeros=torch.randint(0, 1 << bits, (G, N), generator=generator, dtype=torch.uint8),
        g_idx=g_idx.int(),
        bias=torch.randn(N, generator=generator),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The Frobenius norm of the difference over the norm of `expected`, a float64 tensor."""
    expected = expected.cpu()
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


def on(device: torch.device, value):
    """`value` with every tensor of it on `device`: a tensor, a packed or block-sparse weight, None, a tuple of them."""
    if isinstance(value, tuple):
        moved = [on(device, part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value.to(device) if isinstance(value, Tensor) else value


def pair_cover(cases: Sequence[tuple], tried: int = 200) -> list[tuple]:
    """Few of `cases` in which each pair of settings stands that stands in any: the best of so many, again and again."""

    def pairs(case: tuple) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    chance, chosen, left = random.Random(0), [], set().union(*map(pairs, cases))
    while left:
        best = max(chance.sample(cases, min(tried, len(cases))), key=lambda case: len(pairs(case) & left))
        if found := pairs(best) & left:
            chosen.append(best)
            left -= found
    return chosen


# Tests of one body of an operator run on the plain bodies, and once more on the Triton kernels in the interpreter.
plain_only = pytest.mark.skipif(INTERPRET, reason="compiles, or computes in float64, which the kernels do not")
