"""Codebook grids: values by hand, and the property each is made for."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.layers.codebook_linear import CodebookLinear, pack_indices, unpack_indices
from hf_compress.layers.scheme import WeightScheme
from hf_compress.quantization.codebooks import (
    CODEBOOKS,
    NUM_LEVELS,
    RULES,
    WIDTHS,
    balanced_levels,
    binary_levels,
    corrected_levels,
    kmeans_levels,
    multibit_levels,
    nearest_level,
    part_of_rank,
    power_of_two_levels,
    sign_above_threshold,
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
    index = part_of_rank(values, 4)
    for row, parts in zip(values, index, strict=True):
        assert torch.bincount(parts).tolist() == [16] * 4
        assert parts[row.argsort()].tolist() == sorted(parts.tolist())  # larger values in higher parts
    assert not torch.equal(index, nearest_level(values, levels))  # the nearest would not be balanced
    assert torch.bincount(part_of_rank(torch.zeros(1, 10), 4)[0]).tolist() == [3, 3, 2, 2]  # equal values, too


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
    assert sign_above_threshold(values).tolist() == [[2, 0, 1, 1]]


def test_ternary_zeros_follow_the_threshold_and_not_the_nearest_level():
    """0.9 is above the threshold 0.7 * 1.26 = 0.882, so it is large, and 0 would be nearer than alpha = 1.9333."""
    values = torch.tensor([[0.9, 0.9, -4.0, 0.25, -0.25]], dtype=torch.float64)
    levels = ternary_levels(values)
    torch.testing.assert_close(levels, torch.tensor([[-5.8 / 3, 0.0, 5.8 / 3]], dtype=torch.float64))
    assert sign_above_threshold(values).tolist() == [[2, 2, 0, 1, 1]]
    assert nearest_level(values, levels).tolist() == [[1, 1, 0, 1, 1]]
    model = hfc.quantize(tiny_model("bert"), 2, grid="ternary", group_size=-1)
    weight = tiny_model("bert").bert.encoder.layer[0].output.dense.weight
    index = model.bert.encoder.layer[0].output.dense.indices()
    is_large = weight.abs() > 0.7 * weight.abs().mean(dim=1, keepdim=True)
    assert torch.equal(index == 1, ~is_large)


def test_weighted_centroids_are_the_weighted_means_and_even_weights_change_nothing():
    values, h = rows(shape=(4, 60)), rows(seed=1, shape=(4, 60)).square()
    levels = kmeans_levels(values, 2, h)
    index = nearest_level(values, levels)
    for row in range(4):
        for level in range(4):
            mine = index[row] == level
            expected = (h[row] * values[row])[mine].sum() / h[row][mine].sum()
            torch.testing.assert_close(levels[row, level], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(kmeans_levels(values, 2, torch.full((1, 60), 3.0)), kmeans_levels(values, 2))
    weighted, plain = (
        (h * (take_level(nearest_level(values, one), one) - values) ** 2).sum()
        for one in (levels, kmeans_levels(values, 2))
    )
    assert weighted < plain


def test_a_model_whose_centroids_are_weighed_is_nearer_on_what_it_was_weighed_with():
    batch = tiny_batch(tiny_model("llama"), batch=8, padding=False)
    data = [{name: tensor[i].tolist() for name, tensor in batch.items()} for i in range(8)]
    scale = torch.linspace(0.1, 10, 32)  # columns of very unequal inputs

    def model():
        made = tiny_model("llama")
        made.model.layers[0].input_layernorm.weight.data *= scale
        return made

    exact = model()(**batch).logits
    distances = []
    for options in ({}, {"calibration": data}):
        made = hfc.quantize(model(), 3, grid="kmeans", group_size=-1, **options)
        distances.append((made(**batch).logits - exact).norm())
    assert distances[1] < distances[0]


def test_correction_keeps_mean_and_spread_of_each_row():
    values = rows() + 0.3
    for grid in CODEBOOKS:
        levels = CODEBOOKS[grid](values, WIDTHS.get(grid, 3))
        index = RULES[grid](values, levels.shape[-1]) if grid in RULES else nearest_level(values, levels)
        corrected = take_level(index, corrected_levels(values, index, levels))
        torch.testing.assert_close(corrected.mean(-1), values.mean(-1), rtol=0, atol=1e-9)
        torch.testing.assert_close(corrected.std(-1), values.std(-1), rtol=0, atol=1e-9)
    one = torch.full((1, 4), 2.0)  # no spread at all
    assert corrected_levels(one, torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1.5, 3.0]]))[0, 0] == 2.0


def test_a_corrected_model_saves_and_loads_with_the_means_of_its_rows(tmp_path):
    model = hfc.quantize(tiny_model("bert"), 3, grid="power_of_two", group_size=-1, bias_correction=True)
    weight = tiny_model("bert").bert.encoder.layer[0].output.dense.weight
    dense = model.bert.encoder.layer[0].output.dense.dequantize(torch.float32)
    torch.testing.assert_close(dense.mean(1), weight.mean(1), rtol=0, atol=2e-4)  # levels are float16
    model.save_pretrained(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("columns", [1, 7, 32, 45])
def test_indices_of_one_bit_take_one_bit(columns):
    index = torch.randint(0, 2, (5, columns), generator=torch.Generator().manual_seed(0))
    words = pack_indices(index, 1)
    assert words.dtype == torch.int32
    assert words.shape == (-(-columns // 32), 5)
    for n in range(5):
        stream = "".join(f"{int(word) & 0xFFFFFFFF:032b}"[::-1] for word in words[:, n])
        assert stream.startswith("".join(map(str, index[n].tolist())))
    assert torch.equal(unpack_indices(words, 1, columns), index.to(torch.uint8))
    with pytest.raises(ValueError, match="0 or 1, got 0 to 2"):
        pack_indices(torch.tensor([[0, 2]]), 1)


def test_a_binary_model_stores_one_bit_a_weight():
    model = hfc.quantize(tiny_model("bert"), 1, grid="binary", group_size=-1)
    layer = model.bert.encoder.layer[0].output.dense  # (32, 64)
    assert layer.qweight.numel() * 32 == 32 * 64
    assert layer.scheme.bits_per_weight(32, 64) == 1 + 2 * 16 / 64
    weight = tiny_model("bert").bert.encoder.layer[0].output.dense.weight
    alpha = weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(layer.dequantize(torch.float32), alpha * weight.sign(), rtol=1e-3, atol=0)


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
    hfc.quantize(model, WIDTHS.get(grid, 2), grid=grid, group_size=16)
    assert model.bert.encoder.layer[0].output.dense.scheme.num_levels == NUM_LEVELS.get(grid, 4)
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
    with pytest.raises(ValueError, match=r"binary grid is stored in 1 bits a weight, got bits=2"):
        hfc.quantize(tiny_model("bert"), 2, grid="binary")
    for grid in ("uniform", "kmeans"):
        with pytest.raises(ValueError, match="bits must be one of"):
            hfc.quantize(tiny_model("bert"), 1, grid=grid)
    for options in ({"bits": 1}, {"bits": 1, "num_levels": 3}, {"bits": True, "num_levels": 2}):
        with pytest.raises(ValueError, match="bits must be one of"):
            WeightScheme(**options)
    with pytest.raises(ValueError, match="bias_correction moves the levels"):
        hfc.quantize(tiny_model("bert"), 4, bias_correction=True)
    with pytest.raises(ValueError, match="only with grid='kmeans'"):
        hfc.quantize(tiny_model("bert"), 2, grid="ternary", calibration=[{"input_ids": [5, 6]}])
    with pytest.raises(ValueError, match="only maps within the layers"):
        rows_of_ids = [{"input_ids": [5, 6, 7]}]
        hfc.quantize(tiny_model("bert"), {"classifier": 3}, grid="kmeans", group_size=-1, calibration=rows_of_ids)
    with pytest.raises(ValueError, match="grid must be"):
        hfc.quantize(tiny_model("bert"), 4, grid="log")
    with pytest.raises(ValueError, match="grid must be"):
        hfc.quantize(tiny_model("bert"), 4, grid="kmeans", symmetric=True)
