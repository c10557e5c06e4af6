"""Grids whose levels need not be evenly spaced: each row of weights has its own few values.

Every function takes rows (..., g) and gives their `levels` (..., L) in ascending order; `nearest_level` says which of
them each weight takes. Such a grid is stored as packed indices and its levels.

    balanced       the same number of weights at each level (Zhou et al., 2017, https://arxiv.org/abs/1706.07145)
    k-means        levels are centroids (Han et al., 2016, https://arxiv.org/abs/1510.00149)
    power of two   plus and minus a power of two, so products are shifts (Zhou et al., 2017, https://arxiv.org/abs/1702.03044)
    binary         plus and minus the mean magnitude (Rastegari et al., 2016, https://arxiv.org/abs/1603.05279)
    ternary        zero too, below 0.7 of the mean magnitude (Li et al., 2016, https://arxiv.org/abs/1605.04711)
    multi-bit      sums of plus and minus b coefficients (Xu et al., 2018, https://arxiv.org/abs/1802.00150)
    product        centroids of whole sub-vectors (Jegou et al., 2011; Gong et al., 2014, https://arxiv.org/abs/1412.6115)
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.quantization.grids import group_rows
from hf_compress.quantization.modules import matrix

KMEANS_ROUNDS = 25
ALTERNATIONS = 8  # rounds of multi-bit's alternating minimisation; Xu et al. find two enough to train with
TERNARY_THRESHOLD = 0.7  # of the mean magnitude


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index (..., g) of the level (..., L) nearest to each value (..., g); levels ascend."""
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    return torch.searchsorted(between.contiguous(), values.contiguous())


def take_level(index: Tensor, levels: Tensor) -> Tensor:
    """The values (..., g) that `index` stands for."""
    return levels.gather(-1, index)


def balanced_levels(values: Tensor, bits: int) -> Tensor:
    """Means of 2^bits parts of equal population."""
    ordered = values.sort(-1).values
    parts = [part.mean(-1) for part in ordered.tensor_split(2**bits, dim=-1) if part.shape[-1]]
    return torch.stack(parts + [parts[-1]] * (2**bits - len(parts)), -1)


def kmeans_levels(values: Tensor, bits: int) -> Tensor:
    """Centroids by Lloyd's rounds, from evenly spaced ones (Han et al. find these the best start)."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    levels = low + (high - low) * torch.linspace(0, 1, 2**bits, dtype=values.dtype, device=values.device)
    for _ in range(KMEANS_ROUNDS):
        index = nearest_level(values, levels)
        sums = torch.zeros_like(levels).scatter_add_(-1, index, values)
        counts = torch.zeros_like(levels).scatter_add_(-1, index, torch.ones_like(values))
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort(-1).values
    return levels


def power_of_two_levels(values: Tensor, bits: int) -> Tensor:
    """Zero and +-2^k for the 2^(bits - 1) - 1 exponents from the largest down; one level of the 2^bits is a spare zero.

    The largest is 2^floor(log2(4/3 max |w|)), as in incremental network quantization.
    """
    largest = values.abs().amax(-1, keepdim=True)
    top = torch.floor(torch.log2((4 * largest / 3).clamp(min=torch.finfo(values.dtype).tiny)))
    steps = torch.arange(2 ** (bits - 1) - 1, dtype=values.dtype, device=values.device)
    powers = torch.exp2(top - steps) * (largest > 0)  # (..., 2^(bits - 1) - 1)
    zeros = torch.zeros_like(largest)
    return torch.cat([-powers, zeros, zeros, powers.flip(-1)], -1)


def binary_levels(values: Tensor, bits: int = 1) -> Tensor:
    """-alpha and alpha = mean |w|, the least-squares scale of the signs. Two levels, whatever `bits` says."""
    alpha = values.abs().mean(-1, keepdim=True)
    return torch.cat([-alpha, alpha], -1)


def ternary_levels(values: Tensor, bits: int = 2) -> Tensor:
    """-alpha, 0 and alpha, the mean magnitude of the weights above the threshold. Three levels."""
    magnitudes = values.abs()
    is_large = magnitudes > TERNARY_THRESHOLD * magnitudes.mean(-1, keepdim=True)
    alpha = (magnitudes * is_large).sum(-1, keepdim=True) / is_large.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([-alpha, torch.zeros_like(alpha), alpha], -1)


def multibit_levels(values: Tensor, bits: int) -> Tensor:
    """All 2^bits sums of +-alpha_i; coefficients and signs by turns, from the greedy ones.

    Greedy: alpha_i = mean |residual|, b_i its sign. Then: with the signs fixed, the alphas solve least squares; with
    the alphas fixed, each weight takes the nearest sum.
    """
    residual, alphas = values, []
    for _ in range(bits):
        alpha = residual.abs().mean(-1, keepdim=True)
        alphas.append(alpha)
        residual = residual - alpha * residual.sign()
    alpha = torch.cat(alphas, -1)  # (..., bits)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=values.dtype, device=values.device)
    for _ in range(ALTERNATIONS):
        sums, order = (alpha @ signs.T).sort(-1)  # (..., 2^bits)
        chosen = signs[order.gather(-1, nearest_level(values, sums))]  # (..., g, bits)
        gram = chosen.mT @ chosen + 1e-6 * torch.eye(bits, dtype=values.dtype, device=values.device)
        alpha = torch.linalg.solve(gram, (chosen.mT @ values[..., None])[..., 0])
    return (alpha @ signs.T).sort(-1).values


CODEBOOKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "balanced": balanced_levels,
    "binary": binary_levels,
    "kmeans": kmeans_levels,
    "multibit": multibit_levels,
    "power_of_two": power_of_two_levels,
    "ternary": ternary_levels,
}


def install_codebook(model: nn.Module, name: str, scheme: WeightScheme, grid: str) -> None:
    """Put a layer of indices in the place of the linear module `name`. `scheme` says bits and groups."""
    module = model.get_submodule(name)
    weight = matrix(module).float()
    if not weight.isfinite().all():
        raise ValueError(f"The weight of {name} holds NaN or infinity; it cannot be quantized.")
    if grid in ("binary", "ternary") and scheme.bits != 2:
        raise ValueError(f"{name}: a {grid} grid is stored in 2 bits, got bits={scheme.bits}.")
    groups = group_rows(weight, scheme.group_size)  # (N, G, g)
    levels = CODEBOOKS[grid](groups, scheme.bits).to(SCALE_DTYPES[scheme.scale_dtype]).float()  # (N, G, L)
    scheme = replace(scheme, num_levels=levels.shape[-1])
    layer = CodebookLinear.like(module, scheme)
    layer.fill(nearest_level(groups, levels).flatten(1), levels.transpose(0, 1).contiguous())
    model.set_submodule(name, layer.train(module.training))
