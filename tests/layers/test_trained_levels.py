"""Levels of codebooks that learn: the gradient of a centroid is the sum of those of the weights that share it."""

import pytest
import torch
from helpers import tiny_model
from torch import nn

import hf_compress as hfc
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.layers.trained_levels import LevelProduct, TrainedLevels
from hf_compress.layers.trained_scales import train_scales


@pytest.mark.parametrize("groups", [1, 3])
def test_a_centroids_gradient_is_the_sum_of_its_weights_gradients(groups):
    generator = torch.Generator().manual_seed(0)
    N, K, L = 4, 12, 3
    index = torch.randint(0, L, (N, groups, K // groups), generator=generator, dtype=torch.uint8)
    index[0, 0] = 1  # a row whose other levels no weight takes
    c = torch.randn(N, groups, L, generator=generator).double().requires_grad_()
    x, upstream = (torch.randn(7, n, generator=generator).double() for n in (K, N))
    x.requires_grad_()
    W = torch.zeros(N, K).double()
    for n in range(N):
        for k in range(K):
            W[n, k] = c[n, k // (K // groups), int(index[n].flatten()[k])]
    y = LevelProduct.apply(x, c, index)
    torch.testing.assert_close(y, x @ W.T, rtol=1e-6, atol=1e-6)
    grad_x, grad_c = torch.autograd.grad((y * upstream).sum(), [x, c])
    of_weight, expected = upstream.T @ x.detach(), torch.zeros_like(c)
    for n in range(N):
        for k in range(K):
            expected[n, k // (K // groups), int(index[n].flatten()[k])] += of_weight[n, k]
    torch.testing.assert_close(grad_c, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_x, upstream @ W.detach(), rtol=1e-6, atol=1e-6)
    assert (grad_c[0, 0, [0, 2]] == 0).all()


def codebook_layer():
    layer = CodebookLinear.like(nn.Linear(8, 2), WeightScheme(2, -1, num_levels=3))
    index = torch.tensor([[0, 1, 2, 1, 1, 0, 2, 2], [2, 2, 0, 0, 1, 1, 1, 1]])
    return layer.fill(index, torch.tensor([[[-0.5, 0.0, 1.0], [-2.0, 0.0, 2.0]]])), index


def test_a_level_moves_by_shares_of_the_largest_and_is_what_float16_stores():
    layer, index = codebook_layer()
    form = TrainedLevels(layer)
    form.put_on(layer)
    with torch.no_grad():
        form.t.copy_(torch.tensor([[[0.1, 0.2, 0.0]], [[0.0, 1e-9, -0.5]]]))
    expected = torch.tensor([[-0.4, 0.0, 1.0], [-1.5, 0.0, 1.5]]).half().float()  # the second row mirrors itself
    torch.testing.assert_close(layer.dequantize(torch.float32), expected.gather(1, index), rtol=0, atol=0)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    form.take_off(layer)
    assert type(layer) is CodebookLinear and form.stored(layer).levels.dtype == torch.float16
    torch.testing.assert_close(layer(x), y)


def test_levels_that_float16_cannot_hold_are_named():
    layer, _ = codebook_layer()
    form = TrainedLevels(layer)
    with torch.no_grad():
        form.t[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="the.layer: its trained scales or levels are no numbers of torch.float16"):
        form.check("the.layer")


GRIDS = {"binary": 1, "ternary": 2, "multibit": 3, "kmeans": 2}


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_keep_their_form_whatever_they_learn(grid):
    """Signs stay opposite, zeros zero; centroids are free. As they are computed with, and as they are stored."""
    model = hfc.quantize(tiny_model("bert"), GRIDS[grid], grid=grid)
    generator = torch.Generator().manual_seed(0)
    forms = train_scales(model)
    for name, form in forms.items():
        with torch.no_grad():
            form.t.copy_(torch.randn(form.t.shape, generator=generator))
        layer = model.get_submodule(name)
        before, now = layer.levels, form.kept_numbers()
        assert torch.equal(now == 0, before == 0)
        assert torch.equal(now, -now.flip(-1)) == (grid != "kmeans")
        assert ((now != before) | (before == 0)).float().mean() > 0.9
        weight = layer.dequantize(torch.float32)
        layer.hfc_form.take_off(layer)
        torch.testing.assert_close(form.stored(layer).dequantize(torch.float32), weight, rtol=0, atol=0)


def test_a_zero_between_two_learned_values_stays_zero():
    """As trained ternary quantization stores it, with other values above than below."""
    layer, index = codebook_layer()
    form = TrainedLevels(layer)
    with torch.no_grad():
        form.t[0, 0] = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(form.levels()[0, 0], torch.tensor([-0.25, 0.0, 1.75]), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_powers_of_two_are_not_trained(bits):
    model = hfc.quantize(tiny_model("bert"), bits, grid="power_of_two")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="query are powers of two, and trained ones would be none any more"):
        train_scales(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
