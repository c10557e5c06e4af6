"""Brain damage and surgery against exact solutions, and pruning whole models without training."""

import copy

import pytest
import torch
from distillation.data import rows
from helpers import tiny_model

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.masks import layer_projections
from hf_compress.pruning.saliency import damage_saliency, surgery


@pytest.fixture
def problem():
    """W (3, 8), X (8, 40) and H = 2 X X^T / n, in float64."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    X = torch.randn(8, 40, dtype=torch.float64, generator=generator)
    X[1] += X[0]  # inputs that can stand in for one another
    return W, X, 2 * X @ X.T / 40


def loss(W, pruned, X):
    return ((W - pruned) @ X).pow(2).sum().item() / X.shape[1]


def test_damage_is_what_the_loss_rises_by(problem):
    W, X, H = problem
    saliency = damage_saliency(W, H)
    for row, column in ((0, 0), (2, 5)):
        pruned = W.clone()
        pruned[row, column] = 0
        assert saliency[row, column].item() == pytest.approx(loss(W, pruned, X), rel=1e-10)


def slow_surgery(W, H, sparsity, num_columns, by_row):
    """Column by column with the inverse of what is left of H, taken anew each time."""
    W, K = W.clone(), W.shape[1]
    for first in range(0, K, num_columns):
        saliency = torch.stack(
            [W[:, i] ** 2 / torch.linalg.inv(H[i:, i:])[0, 0] for i in range(first, first + num_columns)], dim=1
        )
        gone = torch.zeros_like(saliency, dtype=torch.bool)
        if by_row:
            number = int(sparsity * num_columns)
            gone.scatter_(1, saliency.argsort(dim=1, stable=True)[:, :number], True)
        else:
            gone.view(-1)[saliency.flatten().argsort(stable=True)[: int(sparsity * saliency.numel())]] = True
        for i in range(first, first + num_columns):
            inverse = torch.linalg.inv(H[i:, i:])
            for row in gone[:, i - first].nonzero().flatten():
                W[row, i:] -= W[row, i].clone() / inverse[0, 0] * inverse[0]
                W[row, i] = 0
    return W


@pytest.mark.parametrize(("bank_size", "num_columns"), [(None, 4), (None, 8), (4, 4)], ids=["blocks", "whole", "2:4"])
def test_surgery_matches_removal_with_fresh_inverses(problem, bank_size, num_columns):
    W, X, H = problem
    found = surgery(W, H, 0.5, bank_size=bank_size, damp_percent=0.0, num_columns=num_columns)
    expected = slow_surgery(W, H, 0.5, num_columns, by_row=bank_size is not None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert int((found == 0).sum()) == 12
    damaged = W * (found != 0)
    assert loss(W, found, X) < loss(W, damaged, X), "those that stay make up for those that went"


def test_inputs_that_are_always_zero_lose_their_weights(problem):
    W, X, _ = problem
    X[3] = 0
    found = surgery(W, 2 * X @ X.T / 40, 0.0)
    assert (found[:, 3] == 0).all() and torch.isfinite(found).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obd", "obs"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5", "longformer"])
def test_whole_models_reach_their_sparsity(family, method):
    model = tiny_model(family)
    data = rows(6, kind="seq2seq" if model.config.is_encoder_decoder else "clm")
    assert hfc.prune_weights(model, 0.5, method=method, calibration=data) is model
    matrices = layer_projections(model, anatomy(model))
    zeros = sum(int((m.weight == 0).sum()) for m in matrices) / sum(m.weight.numel() for m in matrices)
    assert zeros == pytest.approx(0.5, abs=0.001)
    assert not model.training


def test_padding_does_not_count_and_banks_hold():
    model, data = tiny_model("bert"), rows(6)
    longer = data.map(lambda r: {n: r[n] + [0] * 8 for n in ("input_ids", "attention_mask")})
    first, second = (
        hfc.prune_weights(copy.deepcopy(model), 0.5, method="obs", calibration=d, bank_size=4) for d in (data, longer)
    )
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    for matrix in layer_projections(first, anatomy(first)):
        assert ((matrix.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="magic"), "method must be one of magnitude, wanda, obd, obs, got 'magic'"),
        (dict(sparsity=1.0), "at least 0 and below 1, got 1.0"),
        (dict(calibration=None), "method='wanda' needs calibration data"),
        (dict(bank_size=5), "bank_size=5 does not divide the 32 columns"),
    ],
    ids=["method", "sparsity", "data", "banks"],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hfc.prune_weights(tiny_model("bert"), **{"sparsity": 0.5, "calibration": rows(4), **options})
