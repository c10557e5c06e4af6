"""Is a difference more than chance? Paired tests and intervals, without a statistics library.

Scores are paired: score i of both models belongs to example i. McNemar, 1947, for right against wrong (the exact form);
else the sign-flip permutation test of Fisher, 1935, or where a metric is no mean of scores, the swapping of answers
(Noreen, 1989). Intervals of scores are percentile bootstraps (Efron, 1979); of
timings, which may come in runs, those of a median by its order statistics, wider by as much as signs repeat.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 10_000
RANDOMIZATIONS = 2_000  # of metrics that are no mean, which take their time
CHUNK_ELEMENTS = 4_000_000  # resampled values held at one time


def mcnemar_p_value(reference: Tensor, candidate: Tensor) -> float:
    """Two-sided p-value of the exact McNemar test of two (n,) vectors of zeros and ones.

    Under "no difference" the examples that only one of both gets right are its own with probability one half.
    """
    only_reference = int(((reference == 1) & (candidate == 0)).sum())
    only_candidate = int(((reference == 0) & (candidate == 1)).sum())
    discordant = only_reference + only_candidate
    tail = sum(math.comb(discordant, k) for k in range(min(only_reference, only_candidate) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def permutation_p_value(differences: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired `differences` (n,), against their signs being chance.

    The share of `resamples` random sign flips whose mean is at least as far from 0, the observed one included.
    """
    differences = differences.double()
    observed = differences.sum().abs()

    def sums(generator: torch.Generator, rows: int) -> Tensor:
        signs = 2 * torch.randint(0, 2, (rows, len(differences)), generator=generator) - 1
        return signs.double() @ differences

    flipped = _resampled(sums, len(differences), resamples, seed).abs()
    slack = 1e-12 * differences.abs().sum()  # sums of the same numbers in another order
    return (1 + int((flipped >= observed - slack).sum())) / (1 + resamples)


def randomization_p_value(
    reference: Tensor,
    candidate: Tensor,
    total: Callable[[Tensor], Tensor],
    *,
    resamples: int = RANDOMIZATIONS,
    seed: int = 0,
) -> float:
    """Two-sided p-value of the difference of what two models come to, for metrics that belong to a set of examples.

    Under "no difference" it is chance which of both gave an example's answer (approximate randomization: Noreen, 1989).
    `reference` and `candidate` (seeds, n, S) hold as many seeds; `total` takes (..., n, S) and returns (...).
    """

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return (total(b) - total(a)).mean(-1)

    observed = difference(reference, candidate).abs()

    def swapped(generator: torch.Generator, rows: int) -> Tensor:
        swap = torch.randint(0, 2, (rows, 1, reference.shape[1], 1), generator=generator).bool()
        return difference(torch.where(swap, candidate, reference), torch.where(swap, reference, candidate))

    drawn = _resampled(swapped, 2 * reference.numel(), resamples, seed).abs()
    slack = 1e-9 * (observed + total(reference).abs().max())  # the same numbers in another order
    return (1 + int((drawn >= observed - slack).sum())) / (1 + resamples)


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of the rows of `values` (n, ...), drawn with replacement.

    `statistic` takes resampled values (resamples, n, ...) and returns one number each, (resamples,).
    """

    def draw(generator: torch.Generator, rows: int) -> Tensor:
        return statistic(values.double()[torch.randint(len(values), (rows, len(values)), generator=generator)])

    drawn = _resampled(draw, values.numel(), resamples, seed)
    low, high = torch.quantile(drawn, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)).tolist()
    return low, high


def median_interval(values: Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the median of `values` (n,), taken one after another, whatever their distribution.

    The number of values below the median is binomial, with standard deviation sqrt(n) / 2. Where neighbours are alike
    (a machine that is slow for a while) its variance is f times that, with f = 1 + 2 sum_k (1 - k / (m + 1)) r_k, r_k
    the autocorrelations of the signs of value - median to lag m = n^(1/3) (Newey and West, 1987). Fewer than 6 values
    are too few for 95%: the interval is then all of their range.
    """
    values = values.double()
    n, median = len(values), values.quantile(0.5)
    signs = torch.where(values > median, 1.0, -1.0).double()
    lags = min(max(1, round(n ** (1 / 3))), n - 1)
    repeats = sum((1 - k / (lags + 1)) * (signs[:-k] * signs[k:]).mean().item() for k in range(1, lags + 1))
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    half = z * math.sqrt(n * max(1.0, 1 + 2 * repeats)) / 2
    low = max(0, math.floor(n / 2 - half))
    ordered = values.sort().values
    return ordered[low].item(), ordered[n - 1 - low].item()


def _resampled(draw: Callable[[torch.Generator, int], Tensor], row_elements: int, resamples: int, seed: int) -> Tensor:
    """`resamples` numbers from `draw(generator, rows)`, in pieces that fit in memory."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK_ELEMENTS // row_elements)
    pieces = [draw(generator, min(rows, resamples - done)) for done in range(0, resamples, rows)]
    return torch.cat(pieces)
