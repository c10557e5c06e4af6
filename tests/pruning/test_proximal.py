"""Proximal steps against their closed form, found by brute force over a fine grid."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.pruning.masks import Blocks
from hf_compress.pruning.proximal import EPSILON, group_lasso_factors, reweighted_threshold, soft_threshold_


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
