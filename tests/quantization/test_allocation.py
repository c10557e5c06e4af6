"""The budgeted choice of bits, against trying everything."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.quantization.allocation import allocate_bits, cheapest_choice
from tests.helpers import tiny_model


def brute_force(costs, sizes, budget):
    best = min(
        (sum(costs[i][c] for i, c in enumerate(choice)), sum(sizes[i][c] for i, c in enumerate(choice)))
        for choice in itertools.product(range(len(costs[0])), repeat=len(costs))
        if sum(sizes[i][c] for i, c in enumerate(choice)) <= budget
    )
    return best[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cheapest_choice_equals_brute_force(data):
    n, c = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    costs = [[data.draw(st.floats(0, 100)) for _ in range(c)] for _ in range(n)]
    sizes = [[data.draw(st.integers(1, 40)) for _ in range(c)] for _ in range(n)]
    least = sum(map(min, sizes))
    budget = data.draw(st.integers(least, least + 80))
    chosen = cheapest_choice(torch.tensor(costs, dtype=torch.float64), torch.tensor(sizes), budget)
    assert sum(sizes[i][j] for i, j in enumerate(chosen)) <= budget
    assert sum(costs[i][j] for i, j in enumerate(chosen)) == pytest.approx(brute_force(costs, sizes, budget), abs=1e-9)


def names(model):
    return [f"bert.encoder.layer.{i}.output.dense" for i in range(4)]


def test_sensitive_modules_get_more_bits_and_the_average_holds():
    model = tiny_model("bert")
    bits = allocate_bits(model, dict(zip(names(model), (100.0, 1.0, 1.0, 0.01), strict=True)), average_bits=3.5)
    assert bits[names(model)[0]] == max(bits.values()) and bits[names(model)[3]] == min(bits.values())
    assert sum(bits.values()) / 4 <= 3.5


def test_budget_in_bytes_counts_scales_and_zero_points():
    model = tiny_model("bert")
    sensitivity = dict.fromkeys(names(model), 1.0)
    # 32 x 48 weights in groups of 16: 3 groups a row of 16-bit scale and 4-bit zero point
    all_four = 4 * (32 * 48 * 4 + 32 * 3 * (16 + 4)) // 8
    assert set(allocate_bits(model, sensitivity, size_bytes=all_four, choices=(2, 4, 8), group_size=16).values()) == {4}
    fewer = allocate_bits(model, sensitivity, size_bytes=all_four - 1, choices=(2, 4, 8), group_size=16)
    assert sorted(fewer.values()) == [2, 4, 4, 4]


def test_given_errors_replace_rounding():
    model = tiny_model("bert")
    errors = {name: {2: 1.0, 4: 1.0, 8: 0.0 if i == 2 else 1.0} for i, name in enumerate(names(model))}
    bits = allocate_bits(model, dict.fromkeys(errors, 1.0), average_bits=3.5, choices=(2, 4, 8), errors=errors)
    assert bits == {name: 8 if i == 2 else 2 for i, name in enumerate(names(model))}


def test_bad_budgets_and_modules_are_refused():
    model = tiny_model("bert")
    sensitivity = dict.fromkeys(names(model), 1.0)
    with pytest.raises(ValueError, match="below the smallest possible size.*average_bits=3"):
        allocate_bits(model, sensitivity, average_bits=2.5, choices=(3, 4))
    with pytest.raises(ValueError, match="one budget"):
        allocate_bits(model, sensitivity)
    with pytest.raises(ValueError, match="no module called 'nowhere'"):
        allocate_bits(model, {"nowhere": 1.0}, average_bits=4)
    with pytest.raises(ValueError, match="bits must be one of"):
        allocate_bits(model, sensitivity, average_bits=4, choices=(4, 5))
