"""How the quality of two models differs, with the same examples answered by both."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.measuring.metrics import MeanOf
from hf_compress.measuring.significance import (
    RANDOMIZATIONS,
    bootstrap_interval,
    mcnemar_p_value,
    permutation_p_value,
    randomization_p_value,
)
from hf_compress.report.result import Difference, Interval


def difference_of(reference: Tensor, candidate: Tensor, total: Callable[[Tensor], Tensor]) -> Difference:
    """Of what a metric keeps of two models, (seeds, n, S) each, and comes to by `total`."""
    if isinstance(total, MeanOf):
        return paired_difference(reference[..., total.column], candidate[..., total.column])
    seeds = math.lcm(len(reference), len(candidate))
    both = [kept.repeat_interleave(seeds // len(kept), 0) for kept in (reference, candidate)]

    def drawn(values: Tensor) -> Tensor:
        """(draws, n, seeds, 2 S) -> (draws,)"""
        first, second = (total(half.movedim(2, 1)).mean(-1) for half in values.chunk(2, -1))
        return second - first

    low, high = bootstrap_interval(torch.cat(both, -1).movedim(0, 1), drawn, resamples=RANDOMIZATIONS)
    value = (total(candidate).mean() - total(reference).mean()).item()
    return Difference(Interval(value, low, high), randomization_p_value(*both, total), "paired randomization")


def paired_difference(reference: Tensor, candidate: Tensor) -> Difference:
    """Of two scores tables (seeds, n), example by example, the seeds of each averaged first."""
    differences = candidate.mean(0) - reference.mean(0)
    low, high = bootstrap_interval(differences, lambda drawn: drawn.mean(1))
    single = len(reference) == len(candidate) == 1
    if single and bool(((reference == 0) | (reference == 1)).all() & ((candidate == 0) | (candidate == 1)).all()):
        p_value, test = mcnemar_p_value(reference[0], candidate[0]), "McNemar, exact"
    else:
        p_value, test = permutation_p_value(differences), "paired permutation"
    return Difference(Interval(differences.mean().item(), low, high), p_value, test)
