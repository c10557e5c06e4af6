"""Proximal steps against their closed form, found by brute force over a fine grid."""

import pytest
import torch
from helpers import tiny_model
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.pruning.masks import Blocks
from hf_compress.pruning.proximal import (
    EPSILON,
    group_lasso_factors,
    reweighted_threshold,
    shrink_largest,
    shrink_rows,
    soft_threshold_,
)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.2])
def test_soft_threshold_minimises_distance_plus_penalty(threshold):
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    for w in (-1.5, -0.2, 0.0, 0.31, 1.0):
        best = grid[((grid - w) ** 2 / 2 + threshold * grid.abs()).argmin()]
        x = torch.tensor([w], dtype=torch.float64)
        soft_threshold_(x, threshold)
        assert x.item() == pytest.approx(best.item(), abs=1e-5)


def test_reweighted_thresholds_push_small_weights_harder():
    w = torch.tensor([0.01, 0.5], dtype=torch.float64)
    thresholds = reweighted_threshold(w, 1e-4)
    assert thresholds.tolist() == pytest.approx([1e-4 / (0.01 + EPSILON), 1e-4 / (0.5 + EPSILON)])
    assert thresholds[0] > thresholds[1]


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D], ids=["linear", "conv1d"])
def test_the_penalty_weighs_by_the_weights_before_the_step(kind):
    """Algorithm 1 of the paper: alpha is that of the weights that the gradient was taken at."""
    module = kind(3, 4)
    before = module.weight.detach().clone()
    callback = hfc.WeightPruning(0.5, proximal=0.02)
    callback._matrices = [Blocks("map", module, (1, 1))]
    callback.on_pre_optimizer_step(None, None, None)
    step = torch.randn_like(before)
    with torch.no_grad():
        module.weight += step
        callback.shrink(0.1)
    stepped = before + step
    expected = stepped.sign() * (stepped.abs() - 0.1 * 0.02 / (before.abs() + EPSILON)).clamp(min=0)
    torch.testing.assert_close(module.weight, expected)


def test_group_lasso_minimises_distance_plus_norm():
    """Along the block's own direction, as any other direction only adds distance."""
    block, strength = torch.tensor([0.6, -0.8], dtype=torch.float64), 0.25
    scales = torch.linspace(-1, 2, 300_001, dtype=torch.float64)
    costs = ((scales[:, None] * block - block) ** 2).sum(1) / 2 + strength * scales.abs() * block.norm()
    factor = group_lasso_factors((block**2).sum(), strength)
    assert factor.item() == pytest.approx(scales[costs.argmin()].item(), abs=1e-4) == 0.75
    assert group_lasso_factors(torch.tensor([0.01, 0.0]) ** 2, 0.25).tolist() == [0.0, 0.0]


def penalised(x, w, strength, norm):
    """The cost whose minimum a proximal step is, eq. 10 or 11 of the text survey as penalty, for one row."""
    height = x.norm() if norm == "l2" else x.abs().max()
    return ((x - w) ** 2).sum() / 2 + strength * height


@pytest.mark.parametrize("shrink, norm", [(shrink_rows, "l2"), (shrink_largest, "max")])
def test_row_penalties_minimise_distance_plus_norm(shrink, norm):
    """The cost is convex: no random step from the minimum, near or far, makes it lower."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    rows[1, 2] = rows[1, 3]  # equal magnitudes
    for strength in (0.0, 0.4, 1.5, 50.0):
        found = shrink(rows, strength)
        for row, x in zip(rows, found, strict=True):
            least = penalised(x, row, strength, norm)
            for scale in (1e-6, 1e-3, 0.1, 1.0):
                steps = scale * torch.randn(200, 5, generator=generator, dtype=torch.float64)
                assert all(penalised(x + step, row, strength, norm) >= least - 1e-12 for step in steps)
        assert (strength < 50) or not found.any()
        assert strength or torch.equal(found, rows)


def test_the_largest_of_a_row_are_cut_to_one_height():
    """Between 3 and 2 the largest has 1.5 to give, then both have 0.25: 2 + 3 - 2 * 1.75 = 1.5 in all."""
    row = torch.tensor([[3.0, -2.0, 0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(shrink_largest(row, 1.5), torch.tensor([[1.75, -1.75, 0.5, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(shrink_largest(row, 0.5), torch.tensor([[2.5, -2.0, 0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("norm, shrink", [("l2", shrink_rows), ("max", shrink_largest)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_neurons_shrink_by_the_weights_into_and_out_of_each(family, norm, shrink):
    model = tiny_model(family)
    callback = hfc.NeuronPruning(0.5, incoming=0.3, outgoing=0.7, norm=norm)
    callback._matrices = callback.matrices(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        callback.shrink(0.1)
    names = {"bert": ("intermediate.dense", "output.dense"), "gpt2": ("c_fc", "mlp.c_proj"),
             "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}[family]  # fmt: skip
    shrunk = 0
    for name, p in model.named_parameters():
        kind = next((i for i, part in enumerate(names) if name.endswith(f"{part}.weight")), None)
        if kind is None or "attention" in name:
            assert torch.equal(p, before[name]), name
            continue
        is_outgoing, is_transposed = kind == len(names) - 1, family == "gpt2"  # a Conv1D holds (K, N)
        rows = before[name].T if is_outgoing != is_transposed else before[name]
        expected = shrink(rows, 0.1 * (0.7 if is_outgoing else 0.3))
        found = p.T if is_outgoing != is_transposed else p
        torch.testing.assert_close(found.detach(), expected)
        shrunk += 1
    assert shrunk == len(names) * model.config.num_hidden_layers
    for options in ({"incoming": -1.0}, {"outgoing": -0.1}, {"norm": "l1"}):
        with pytest.raises(ValueError, match="strengths of a penalty, 0 or more"):
            hfc.NeuronPruning(0.5, **options)
