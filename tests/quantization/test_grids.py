"""Uniform grids: values by hand, and the range searches against what they claim."""

import math

import pytest
import torch

from hf_compress.quantization.grids import (
    RANGES,
    aciq_range,
    dequantize_from_grid,
    find_grid,
    grid_error,
    grid_from_range,
    group_rows,
    laplace_clip,
    normal_clip,
    quantize_to_grid,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)


def test_asymmetric_grid_by_hand():
    values = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    scale, zero = find_grid(values, 2)
    assert scale.item() == 1.0 and zero.item() == 1.0
    q = quantize_to_grid(values, scale, zero, 2)
    assert q.tolist() == [[0.0, 1.0, 1.0, 3.0]]
    assert dequantize_from_grid(q, scale, zero).tolist() == [[-1.0, 0.0, 0.0, 2.0]]


def test_symmetric_grid_by_hand():
    values = torch.tensor([[-1.5, 0.5, 0.2]])
    scale, zero = find_grid(values, 2, symmetric=True)
    assert scale.item() == 1.0 and zero.item() == 2.0
    assert quantize_to_grid(values, scale, zero, 2).tolist() == [[0.0, 2.0, 2.0]]  # half goes to even


@BITS
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_minmax_is_within_half_a_step(bits, symmetric):
    values = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale, zero = find_grid(values, bits, symmetric=symmetric, scale_dtype=torch.float64)
    error = (dequantize_from_grid(quantize_to_grid(values, scale, zero, bits), scale, zero) - values).abs()
    # symmetric: the largest value lies half a step beyond the grid; asymmetric: the zero point is rounded
    assert (error <= (0.5 + (not symmetric) * 0.5) * scale + 1e-12).all()
    assert zero.min() >= 0 and zero.max() <= 2**bits - 1


@BITS
def test_zero_is_on_the_grid_and_zeros_stay_zero(bits):
    values = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 5.0], [-3.0, -4.0, 0.0]])
    scale, zero = find_grid(values, bits)
    q = quantize_to_grid(torch.zeros_like(values), scale, zero, bits)
    assert (dequantize_from_grid(q, scale, zero) == 0).all()
    assert (scale > 0).all()


@BITS
def test_mse_range_beats_minmax_and_every_random_shrink(bits):
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = grid_error(values, *find_grid(values, bits, range_method="mse", importance=importance), bits, importance)
    low, high = RANGES["minmax"](values, bits)
    for shrink in (1.0, 0.9, 0.7, 0.55):
        grid = grid_from_range(shrink * low, shrink * high, bits)
        assert best.sum() <= 1.02 * grid_error(values, *grid, bits, importance).sum()
    plain = grid_error(values, *find_grid(values, bits), bits, importance)
    assert (best <= plain).all()


def test_percentile_range_drops_the_tails():
    values = torch.linspace(-1, 1, 2001)[None]
    values[0, -1] = 100.0
    low, high = RANGES["percentile"](values, 4)
    assert low.item() == pytest.approx(-0.999, abs=1e-6)
    assert high.item() == pytest.approx(0.999, abs=1e-6)
    torch.testing.assert_close(high, torch.quantile(values, 0.9995, dim=-1, keepdim=True))


def test_aciq_clips_are_those_that_minimise_the_error_of_the_distribution():
    """The expected error by numerical integration, on a grid of clips; and the paper's multiples at 2, 3 and 4 bits."""
    x = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    densities = {
        laplace_clip: torch.exp(-x) / 2,  # mean distance 1
        normal_clip: torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
    }
    for clip, density in densities.items():
        for bits in (2, 4):

            def expected_error(a, density=density, bits=bits):
                return float(2 * torch.trapezoid((x - a).clamp(min=0) ** 2 * density, x)) + a**2 / (3 * 4**bits)

            best = clip(bits)
            assert expected_error(best) < min(expected_error(best - 0.01), expected_error(best + 0.01))
    assert [laplace_clip(bits) for bits in (2, 3, 4)] == pytest.approx([2.83, 3.89, 5.03], abs=0.01)
    assert [normal_clip(bits) for bits in (2, 3, 4)] == pytest.approx([1.71, 2.15, 2.55], abs=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
def test_aciq_range_is_near_the_best_one_and_follows_shift_and_scale(symmetric):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 4000, generator=generator, dtype=torch.float64)
    laplace = -torch.empty(4, 4000, dtype=torch.float64).exponential_(generator=generator)
    laplace *= torch.randn(4, 4000, generator=generator, dtype=torch.float64).sign()
    for values in (normal, laplace):
        errors = {}
        for name in ("aciq", "mse", "minmax"):
            grid = find_grid(values, 4, symmetric=symmetric, range_method=name, scale_dtype=torch.float64)
            errors[name] = grid_error(values, *grid, 4, None)
        assert (errors["aciq"] < errors["minmax"]).all()
        assert (errors["aciq"] < 1.15 * errors["mse"]).all()  # without its search over twenty ranges
        low, high = aciq_range(values, 4)
        moved = aciq_range(3 * values + 5, 4)
        torch.testing.assert_close(moved[0], 3 * low + 5)
        torch.testing.assert_close(moved[1], 3 * high + 5)
    assert [float(x) for x in aciq_range(torch.full((1, 8), 2.0), 4)] == [2.0, 2.0]


def test_kl_range_clips_an_outlier_and_keeps_a_uniform_range():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 20000, generator=generator)
    normal[0, 0] = 40.0
    low, high = RANGES["kl"](normal, 4)
    assert 2.0 < high.item() < 10.0 and low.item() >= -high.item()
    uniform = torch.rand(1, 20000, generator=generator) * 2 - 1
    low, high = RANGES["kl"](uniform, 4)
    assert high.item() > 0.9 and low.item() < -0.9


def test_kl_range_of_rows_is_that_of_each_row():
    values = torch.randn(3, 4000, generator=torch.Generator().manual_seed(3)) ** 3
    together = RANGES["kl"](values, 4)
    for row in range(3):
        for whole, single in zip(together, RANGES["kl"](values[row : row + 1], 4), strict=True):
            torch.testing.assert_close(whole[row : row + 1], single)


def test_float16_scales_are_chosen_before_the_integers():
    values = torch.randn(4, 64, dtype=torch.float64) * 1e-5
    scale, _ = find_grid(values, 8, scale_dtype=torch.float16)
    assert (scale > 0).all() and torch.equal(scale, scale.half().double())
    with pytest.raises(ValueError, match="does not fit"):
        find_grid(values * 1e13, 2, scale_dtype=torch.float16)


def test_groups():
    weight = torch.arange(12.0).reshape(2, 6)
    assert group_rows(weight, 3).shape == (2, 2, 3)
    assert group_rows(weight, -1).shape == (2, 1, 6)
    assert group_rows(weight, 3)[1, 0].tolist() == [6.0, 7.0, 8.0]
    with pytest.raises(ValueError, match="group_size=4, in_features=6"):
        group_rows(weight, 4)
    with pytest.raises(ValueError, match="range_method"):
        find_grid(weight, 4, range_method="max")
