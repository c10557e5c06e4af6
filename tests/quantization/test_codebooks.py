"""Codebook grids: values by hand, and the property each is made for."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.quantization.codebooks import (
    CODEBOOKS,
    balanced_levels,
    binary_levels,
    kmeans_levels,
    multibit_levels,
    nearest_level,
    power_of_two_levels,
    take_level,
    ternary_levels,
)
from hf_compress.quantization.grids import dequantize_from_grid, find_grid, quantize_to_grid
from tests.helpers import tiny_batch, tiny_model


def rows(seed=0, shape=(5, 200)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(values, levels):
    return (take_level(nearest_level(values, levels), levels) - values).square().sum(-1)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_each_value_takes_its_nearest_level(name):
    values = rows()
    levels = CODEBOOKS[name](values, 3)
    assert (levels.diff(dim=-1) >= 0).all()
    taken = take_level(nearest_level(values, levels), levels)
    distances = (values[..., None] - levels[:, None]).abs()
    torch.testing.assert_close((taken - values).abs(), distances.amin(-1))


def test_balanced_parts_have_equal_population():
    values = rows(shape=(3, 64))
    levels = balanced_levels(values, 2)
    expected = values.sort(-1).values.view(3, 4, 16).mean(-1)
    torch.testing.assert_close(levels, expected)


def test_kmeans_finds_clusters_and_no_centroid_can_move():
    centres = torch.tensor([-3.0, -1.0, 0.5, 4.0], dtype=torch.float64)
    values = (centres.repeat(25) + 0.01 * rows(shape=(1, 100))).view(1, 100)
    torch.testing.assert_close(kmeans_levels(values, 2), centres[None], rtol=0, atol=0.01)
    values = rows()
    scale, zero = find_grid(values, 3, range_method="mse", scale_dtype=torch.float64)
    uniform = (dequantize_from_grid(quantize_to_grid(values, scale, zero, 3), scale, zero) - values).square().sum(-1)
    assert (error(values, kmeans_levels(values, 3)) < uniform).all()


def test_power_of_two_by_hand():
    levels = power_of_two_levels(torch.tensor([[0.9, -0.3, 0.1]]), 3)
    assert levels.tolist() == [[-1.0, -0.5, -0.25, 0.0, 0.0, 0.25, 0.5, 1.0]]


def test_binary_and_ternary_by_hand():
    values = torch.tensor([[1.0, -3.0, 0.2, -0.2]])
    torch.testing.assert_close(binary_levels(values), torch.tensor([[-1.1, 1.1]]))
    torch.testing.assert_close(ternary_levels(values), torch.tensor([[-2.0, 0.0, 2.0]]))  # threshold 0.7 * 1.1


def test_binary_scale_is_the_least_squares_one():
    values = rows()
    for factor in (0.95, 1.05):
        assert (error(values, binary_levels(values)) < error(values, factor * binary_levels(values))).all()


def test_multibit_is_greedy_refined():
    values = rows()
    greedy, residual = torch.zeros_like(values), values
    for _ in range(3):
        step = residual.abs().mean(-1, keepdim=True) * residual.sign()
        greedy, residual = greedy + step, residual - step
    assert (error(values, multibit_levels(values, 3)) < (greedy - values).square().sum(-1)).all()
    levels = multibit_levels(values, 3)
    torch.testing.assert_close(levels, -levels.flip(-1), rtol=1e-6, atol=1e-9)  # sums of +- are symmetric
    torch.testing.assert_close(multibit_levels(values, 1), binary_levels(values), rtol=1e-6, atol=1e-8)


def test_more_levels_are_nearer():
    values = rows()
    for name in ("balanced", "kmeans", "multibit"):
        errors = [error(values, CODEBOOKS[name](values, bits)).sum() for bits in (1, 2, 3, 4)]
        assert errors == sorted(errors, reverse=True), name


@pytest.mark.parametrize("grid", CODEBOOKS)
def test_a_model_on_a_codebook_saves_and_loads(grid, tmp_path):
    model = tiny_model("bert")
    batch = tiny_batch(model)
    original = model(**batch).logits
    hfc.quantize(model, 2, grid=grid, group_size=16)
    assert isinstance(model.bert.encoder.layer[0].output.dense, CodebookLinear)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, logits)
    loaded.dequantize()
    assert torch.equal(loaded(**batch).logits, logits)
    assert (logits - original).norm() < original.norm()
    with pytest.raises(ValueError, match="codebooks|gemma format"):
        hfc.export(model, tmp_path / "other", format="gptq")


def test_kmeans_is_nearer_than_uniform_on_a_model():
    batch = tiny_batch(tiny_model("llama"))
    exact = tiny_model("llama")(**batch).logits
    distances = [
        (hfc.quantize(tiny_model("llama"), 3, grid=grid, group_size=-1)(**batch).logits - exact).norm()
        for grid in ("uniform", "kmeans")
    ]
    assert distances[1] < distances[0]


def test_codebooks_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="stored in 2 bits"):
        hfc.quantize(tiny_model("bert"), 4, grid="ternary")
    with pytest.raises(ValueError, match="grid must be"):
        hfc.quantize(tiny_model("bert"), 4, grid="log")
    with pytest.raises(ValueError, match="grid must be"):
        hfc.quantize(tiny_model("bert"), 4, grid="kmeans", symmetric=True)
