"""Uniform grids: which values a weight of few bits can take, and how its range is chosen.

    w ~ scale * (q - zero_point),  q in [0, 2^bits - 1]

Every function works on rows: a weight (N, K) is first split by `group_rows` into (N, G, g), and a range belongs to the
last dimension. One row of everything is the per-tensor grid, one row per output channel the per-channel grid.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme

FLOAT16_STEP, LARGEST_FLOAT16 = 2.0**-24, 65504.0  # between the smallest numbers of float16; its largest
SHRINK_STEPS, SMALLEST_SHRINK = 20, 0.43  # the range search tries shares of the full range from 1 down to this
PERCENTILE = 0.999  # share of the values inside the percentile range
KL_BINS, KL_CANDIDATES, KL_ROWS, KL_SMOOTHING = 512, 32, 2048, 1e-4


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) on its grid: scale[g_idx[k], n] * (q[n, k] - zero_point[g_idx[k], n])."""

    q: Tensor  # (N, K) uint8
    scales: Tensor  # (G, N) float
    zero_points: Tensor  # (G, N) uint8
    g_idx: Tensor  # (K,) int32, the group of each column

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        groups = self.g_idx.long()
        scale, zero_point = self.scales.to(dtype)[groups].t(), self.zero_points.to(dtype)[groups].t()  # (N, K)
        return dequantize_from_grid(self.q.to(dtype), scale, zero_point)

    def split(self, sizes: Sequence[int]) -> list["QuantizedWeight"]:
        """Cut into weights of so many rows each, which share no memory."""
        parts = zip(self.q.split(sizes), self.scales.split(sizes, 1), self.zero_points.split(sizes, 1), strict=True)
        whole = torch.contiguous_format
        return [QuantizedWeight(*(t.clone(memory_format=whole) for t in (*part, self.g_idx))) for part in parts]


def of_groups(q: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedWeight:
    """Integers (N, G, g) of neighbouring columns with the grid (N, G, 1) of each group."""
    g_idx = torch.arange(q[0].numel(), dtype=torch.int32, device=q.device) // q.shape[-1]
    scale, zero_point = (t[..., 0].t().contiguous() for t in (scale, zero_point))  # (G, N)
    return QuantizedWeight(q.flatten(1).to(torch.uint8), scale, zero_point.to(torch.uint8), g_idx)


def group_rows(weight: Tensor, group_size: int) -> Tensor:
    """Split a weight (N, K) into its groups along K, (N, G, g). `group_size` -1 makes one group of the whole row."""
    N, K = weight.shape
    if group_size == -1:
        group_size = K
    if group_size < 1 or K % group_size:
        raise ValueError(
            f"group_size must divide in_features: got group_size={group_size}, in_features={K}. "
            "Choose a divisor, -1 for one group per row, or leave this layer out with `skip_modules`."
        )
    return weight.reshape(N, K // group_size, group_size)


def grid_from_range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [low, high] and contains zero.

    returns  scale, zero_point of the shape of `low`; the zero point is a whole number in [0, 2^bits - 1] (float).
    Symmetric: zero_point = 2^(bits - 1) and scale = 2 max(-low, high) / (2^bits - 1), as GPTQ has it.
    """
    largest = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = 2 * torch.maximum(-low, high) / largest
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / largest
        zero_point = None
    scale = torch.where(scale > 0, scale.clamp(min=smallest_scale(scale.dtype)), 1.0)  # a group of zeros: any will do
    if zero_point is None:
        zero_point = (-low / scale).round().clamp(0, largest)
    return scale, zero_point


def smallest_scale(dtype: torch.dtype) -> float:
    """A scale must not round to zero: float16 has its last positive number, others the last that divides well."""
    return FLOAT16_STEP if dtype == torch.float16 else torch.finfo(dtype).tiny


def fits_float16(values: Tensor, bits: int, *, symmetric: bool = False) -> bool:
    """Whether float16 holds the scale of each row (..., g), whatever range of it is chosen.

    It holds a scale if rounding it moves neither end of the grid by more than half a step: a relative error below
    2^-(bits + 1), and float16 is off by half of FLOAT16_STEP at most where scales are small.
    """
    if not values.numel():
        return True
    low, high = minmax_range(values, bits)
    low, high = torch.aminmax(grid_from_range(low.float(), high.float(), bits, symmetric=symmetric)[0])
    return float(low) * SMALLEST_SHRINK >= 2**bits * FLOAT16_STEP and float(high) <= LARGEST_FLOAT16 / 2  # GPTQ adds


def quantize_to_grid(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The integers q in [0, 2^bits - 1] nearest to `values`, as float. The grid broadcasts over the last dimension."""
    return (values / scale + zero_point).round().clamp(0, 2**bits - 1)


def dequantize_from_grid(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return scale * (q - zero_point)


def grid_error(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Weighted squared error of rounding each row (..., g) to its grid (..., 1): shape (..., 1)."""
    q = torch.add(zero_point, values / scale).round_().clamp_(0, 2**bits - 1)
    error = q.sub_(zero_point).mul_(scale).sub_(values).square_()
    if importance is not None:
        error = error.mul_(importance)
    return error.sum(-1, keepdim=True)


def minmax_range(values: Tensor, bits: int, *, symmetric: bool = False, importance: Tensor | None = None):
    """The full range: nothing is clipped."""
    return values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)


def percentile_range(values: Tensor, bits: int, *, symmetric: bool = False, importance: Tensor | None = None):
    """The central PERCENTILE of the values; the tails are clipped."""
    tail = (1 - PERCENTILE) / 2
    ordered = values.sort(-1).values  # torch.quantile refuses more than 16M values
    last = values.shape[-1] - 1
    return (_interpolate(ordered, tail * last), _interpolate(ordered, (1 - tail) * last))


def _interpolate(ordered: Tensor, position: float) -> Tensor:
    below = min(int(position), ordered.shape[-1] - 1)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], position - below)


def mse_range(values: Tensor, bits: int, *, symmetric: bool = False, importance: Tensor | None = None):
    """The shrunken range with the smallest squared error, each value weighted by `importance` (same shape, or g)."""
    low, high = minmax_range(values, bits)
    best_low, best_high, best_error = low, high, torch.full_like(low, torch.inf)
    for shrink in torch.linspace(1.0, SMALLEST_SHRINK, SHRINK_STEPS).tolist():
        scale, zero_point = grid_from_range(shrink * low, shrink * high, bits, symmetric=symmetric)
        error = grid_error(values, scale, zero_point, bits, importance)
        better = error < best_error
        best_low, best_high = torch.where(better, shrink * low, best_low), torch.where(better, shrink * high, best_high)
        best_error = torch.where(better, error, best_error)
    return best_low, best_high


def kl_range(values: Tensor, bits: int, *, symmetric: bool = False, importance: Tensor | None = None):
    """The clipped range [-c, c] whose quantized histogram is nearest to the full one in KL divergence.

    The entropy calibration of Migacz, "8-bit inference with TensorRT", 2017: the values beyond c are counted in the
    last bin of the reference, and the quantized histogram spreads each level's count evenly over its non-empty bins.
    Meant for activations and for whole tensors: a row of a few values has no histogram worth the name.
    """
    flat = values.reshape(-1, values.shape[-1]).abs().float()
    limits = torch.cat([_kl_limits(rows, bits) for rows in flat.split(KL_ROWS)]).reshape(*values.shape[:-1], 1)
    limits = limits.to(values.dtype)
    return torch.maximum(-limits, values.amin(-1, keepdim=True)), torch.minimum(limits, values.amax(-1, keepdim=True))


def _kl_limits(magnitudes: Tensor, bits: int) -> Tensor:
    """The best |value| to clip at, one per row of (rows, g): shape (rows, 1)."""
    largest = magnitudes.amax(-1, keepdim=True)
    levels = 2 ** (bits - 1)  # of one sign
    bins = (magnitudes / largest.clamp(min=torch.finfo(torch.float32).tiny) * KL_BINS).long().clamp(max=KL_BINS - 1)
    counts = torch.zeros(len(bins), KL_BINS, dtype=torch.double).scatter_add_(1, bins, torch.ones_like(bins).double())
    best = torch.full_like(largest, KL_BINS)
    best_divergence = torch.full_like(largest, torch.inf, dtype=torch.double)
    for kept in torch.linspace(levels, KL_BINS, KL_CANDIDATES).long().tolist():
        reference = counts[:, :kept].clone()
        reference[:, -1] += counts[:, kept:].sum(-1)
        level = torch.arange(kept) * levels // kept  # the level each bin falls into
        filled = (counts[:, :kept] > 0).double()
        per_level = torch.zeros(len(bins), levels, dtype=torch.double).index_add_(1, level, counts[:, :kept])
        bins_per_level = torch.zeros_like(per_level).index_add_(1, level, filled)
        quantized = filled * (per_level / bins_per_level.clamp(min=1))[:, level]
        p = reference / reference.sum(-1, keepdim=True)
        q = quantized / quantized.sum(-1, keepdim=True).clamp(min=1)
        q = (q + KL_SMOOTHING / kept) / (1 + KL_SMOOTHING)  # the clipped tail may fall on a bin that was empty
        divergence = torch.special.xlogy(p, p / q).sum(-1, keepdim=True)
        better = divergence < best_divergence
        best = torch.where(better, kept, best)
        best_divergence = torch.where(better, divergence, best_divergence)
    return largest * best / KL_BINS


def aciq_range(values: Tensor, bits: int, *, symmetric: bool = False, importance: Tensor | None = None):
    """The clip [m - a, m + a] with the least expected error, if the values are of a Laplace or a normal distribution.

    Banner et al., 2019, https://arxiv.org/abs/1810.05723, section 3: a is a multiple of the mean distance to the mean m
    (Laplace), or of the standard deviation (normal), that only the bits decide. Each row takes the one of the two with
    the smaller squared error. Unlike "mse" nothing is searched for.
    """
    low, high = minmax_range(values, bits)
    m = values.mean(-1, keepdim=True)
    distance = values - m
    clips = (laplace_clip(bits) * distance.abs().mean(-1, keepdim=True),
             normal_clip(bits) * distance.square().mean(-1, keepdim=True).sqrt())  # fmt: skip
    ranges = [(torch.maximum(m - a, low), torch.minimum(m + a, high)) for a in clips]
    errors = [grid_error(values, *grid_from_range(*r, bits, symmetric=symmetric), bits, importance) for r in ranges]
    return tuple(torch.where(errors[0] <= errors[1], *pair) for pair in zip(*ranges, strict=True))


@cache
def laplace_clip(bits: int) -> float:
    """Of unit mean distance: the a that minimises 2 e^-a + a^2 / (3 * 4^bits), clipping and rounding. Eq. 9 and 10."""
    return _root(lambda a: a / (3 * 4**bits) - math.exp(-a))


@cache
def normal_clip(bits: int) -> float:
    """Of unit variance: the a that minimises 2 E[(x - a)^2; x > a] + a^2 / (3 * 4^bits)."""

    def slope(a: float) -> float:
        beyond = math.erfc(a / math.sqrt(2)) / 2  # P(x > a)
        density = math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
        return 2 * a / (3 * 4**bits) - 4 * (density - a * beyond)

    return _root(slope)


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 64.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


RANGES: dict[str, Callable] = {
    "aciq": aciq_range,
    "minmax": minmax_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "kl": kl_range,
}


def find_grid(
    values: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    range_method: str = "minmax",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of `values`.

    values      (..., g)  float
    importance  (..., g)  weight of each value's squared error, only for range_method "mse"
    returns     scale, zero_point, both (..., 1) float; the scale already rounded to `scale_dtype`, so that what is
                stored is what the integers were chosen for.
    """
    if range_method not in RANGES:
        raise ValueError(f"range_method must be one of {sorted(RANGES)}, got {range_method!r}.")
    low, high = RANGES[range_method](values, bits, symmetric=symmetric, importance=importance)
    scale, zero_point = grid_from_range(low, high, bits, symmetric=symmetric)
    return round_scale(scale, scale_dtype), zero_point


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to what `dtype` can hold, in its own dtype. Raises where a scale overflows."""
    rounded = scale.clamp(min=smallest_scale(dtype)).to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(
            f"A scale of {float(scale.abs().nan_to_num().max()):.3g} does not fit {dtype}. "
            "Store the scales of this layer in float32: scale_dtype='float32', or 'auto'."
        )
    return rounded.to(scale.dtype)


def check_weight(weight: Tensor, name: str) -> None:
    if not weight.isfinite().all():
        raise ValueError(f"The weight of {name} holds NaN or infinity; it cannot be quantized.")


def round_to_nearest(weight: Tensor, scheme: WeightScheme, *, range_method: str = "mse", name: str = "the weight"):
    """Each value of a weight (N, K), or of the rows of an embedding (V, D), takes the nearest one of its group's grid.

    The baseline of every table.
    """
    check_weight(weight, name)
    groups = group_rows(weight.float(), scheme.group_size)  # (N, G, g)
    scale, zero_point = find_grid(groups, scheme.bits, symmetric=scheme.symmetric, range_method=range_method,
                                  scale_dtype=SCALE_DTYPES[scheme.scale_dtype])  # fmt: skip
    return of_groups(quantize_to_grid(groups, scale, zero_point, scheme.bits), scale, zero_point)
