"""Tests of tests: against counting all outcomes."""

import itertools

import pytest
import torch

from hf_compress.measuring.significance import bootstrap_interval, mcnemar_p_value, median_interval, permutation_p_value


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (2, 7), (5, 5), (0, 9)])
def test_mcnemar_equals_counting_every_outcome(only_first, only_second):
    """Of all ways in which the discordant examples could have fallen, the share that is at least as lopsided."""
    n = only_first + only_second
    outcomes = [sum(way) for way in itertools.product((0, 1), repeat=n)]
    expected = sum(abs(2 * k - n) >= abs(only_first - only_second) for k in outcomes) / len(outcomes)
    reference = torch.tensor([1] * only_first + [0] * only_second + [1, 0, 1])
    candidate = torch.tensor([0] * only_first + [1] * only_second + [1, 0, 1])
    assert mcnemar_p_value(reference, candidate) == pytest.approx(expected)


def test_mcnemar_of_the_textbook_value():
    """10 discordant examples, 9 to 1: 2 * (1 + 10) / 1024."""
    reference = torch.tensor([1] * 9 + [0])
    assert mcnemar_p_value(reference, 1 - reference) == pytest.approx(22 / 1024)


def test_mcnemar_takes_thousands_of_discordant_examples():
    reference = torch.arange(4000) % 2
    assert mcnemar_p_value(reference, 1 - reference) == 1.0


def test_permutation_equals_flipping_all_signs():
    differences = torch.tensor([0.5, -0.1, 0.3, 0.2, 0.7, 0.4, -0.2, 0.6, 0.1, 0.25])
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
    expected = ((signs @ differences).abs() >= differences.sum().abs() - 1e-6).double().mean().item()
    # 10,000 draws: a standard error of 0.2 points at p = 0.04
    assert permutation_p_value(differences) == pytest.approx(expected, abs=0.01)


def test_no_difference_has_a_p_value_of_one():
    assert permutation_p_value(torch.zeros(50)) == 1.0
    assert mcnemar_p_value(torch.ones(50), torch.ones(50)) == 1.0
    assert bootstrap_interval(torch.zeros(50), lambda drawn: drawn.mean(1)) == (0.0, 0.0)


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    low, high = bootstrap_interval(values, lambda drawn: drawn.mean(1))
    error = 1.96 * values.std().item() / 2000**0.5
    # the ends of 10,000 resamples scatter by about 2% of the error
    assert low == pytest.approx(values.mean().item() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean().item() + error, abs=0.1 * error)


def test_pairs_stay_together():
    """The ratio of columns of which one is twice the other is 2 in every resample."""
    column = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.double) + 0.5
    pairs = torch.stack([2 * column, column], dim=1)
    low, high = bootstrap_interval(pairs, lambda drawn: drawn[:, :, 0].sum(1) / drawn[:, :, 1].sum(1))
    assert (low, high) == (pytest.approx(2.0), pytest.approx(2.0))


def test_median_interval_of_ten_values():
    """10 / 2 - 1.96 sqrt(10) / 2 = 1.9: the second and the ninth; outside with probability 2 (1 + 10) / 1024."""
    mixed = torch.tensor([3.0, 8, 1, 9, 0, 6, 4, 2, 7, 5])  # above and below the median by turns, nearly
    assert median_interval(mixed) == (1.0, 8.0)
    assert median_interval(torch.tensor([2.0, 1.0, 4.0])) == (1.0, 4.0), "three say no more than their range"
    assert median_interval(torch.ones(50)) == (1.0, 1.0)


def covers(n, rho, draws=400):
    """Share of intervals that hold the true median 0 of n values, each rho times the one before plus noise."""
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(draws, n + 30, generator=generator, dtype=torch.double)
    series = torch.zeros(draws)
    columns = []
    for step in noise.unbind(1):
        series = rho * series + step
        columns.append(series)
    intervals = [median_interval(values) for values in torch.stack(columns[30:], dim=1)]
    return sum(low <= 0 <= high for low, high in intervals) / draws


@pytest.mark.parametrize("n", [20, 200])
def test_median_interval_holds_the_median_as_often_as_it_says(n):
    assert covers(n, rho=0.0) > 0.93  # 0.95 or a little more; a standard error of 1.1 points


def test_median_interval_is_wider_where_slow_times_come_in_runs():
    """A plain interval of 200 such values holds the median in 3 of 4 cases."""
    assert covers(200, rho=0.6) > 0.88
