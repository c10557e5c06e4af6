"""Packed layers against the formula, in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.layers.activations import round_per_token, round_to_range
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme, auto_group_size
from hf_compress.quantization.grids import round_to_nearest

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)


def integers(bits, N=24, K=48, groups=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, N, generator=generator).half()
    zeros = torch.randint(0, 2**bits, (groups, N), generator=generator, dtype=torch.uint8)
    return q, scales, zeros


@BITS
@pytest.mark.parametrize("order", ["in-order", "act-order"])
def test_linear_is_scale_times_distance_to_zero(bits, order):
    q, scales, zeros = integers(bits)
    g_idx = torch.arange(48) // 16
    if order == "act-order":
        g_idx = g_idx[torch.randperm(48, generator=torch.Generator().manual_seed(1))]
    linear = nn.Linear(48, 24)
    scheme = WeightScheme(bits, 16, desc_act=order == "act-order")
    layer = PackedLinear.like(linear, scheme).fill(q, scales, zeros, g_idx)
    W = scales.double()[g_idx].T * (q.double() - zeros.double()[g_idx].T)
    x = torch.randn(5, 48)
    expected = (x.double() @ W.T + linear.bias.double()).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6 * float(W.abs().max()))  # sums in float32
    assert torch.equal(layer.weight.double(), W.float().double())
    assert layer.bias is linear.bias
    torch.testing.assert_close(layer.unpacked()(x), layer(x))


def test_conv1d_becomes_itself_again():
    conv = Conv1D(24, 48)
    q, scales, zeros = integers(4)
    layer = PackedLinear.like(conv, WeightScheme(4, 16)).fill(q, scales, zeros)
    again = layer.unpacked()
    x = torch.randn(2, 3, 48)
    assert isinstance(again, Conv1D) and again.weight.shape == conv.weight.shape
    torch.testing.assert_close(again(x), layer(x))


@BITS
def test_embedding_rows_are_those_of_the_table(bits):
    q, scales, zeros = integers(bits, N=20, K=48)
    table = nn.Embedding(20, 48, padding_idx=0)
    layer = PackedEmbedding.like(table, WeightScheme(bits, 16)).fill(q, scales.T, zeros.T)
    ids = torch.tensor([[3, 19], [0, 3]])
    W = scales.double().repeat_interleave(16, 0).T * (q.double() - zeros.double().repeat_interleave(16, 0).T)
    assert torch.equal(layer(ids).double(), W[ids].float().double())
    assert layer.padding_idx == 0 and isinstance(layer.unpacked(), nn.Embedding)
    assert torch.equal(layer.unpacked().weight[ids], layer(ids))


def test_weights_take_the_bits_that_are_promised():
    scheme = WeightScheme(3, 16)
    layer = PackedLinear.like(nn.Linear(64, 32, bias=False), scheme)
    stored = sum(b.numel() * b.element_size() * 8 for b in layer.buffers())
    assert stored == scheme.bits_per_weight(32, 64) * 32 * 64 == (3 + (16 + 3) / 16) * 32 * 64
    assert WeightScheme(4, -1, symmetric=True).bits_per_weight(32, 64) == 4 + 16 / 64
    assert WeightScheme(4, -1, desc_act=True).bits_per_weight(32, 64) == 4 + 20 / 64 + 32 / 32


def test_writing_into_a_packed_weight_raises():
    layer = PackedLinear.like(nn.Linear(32, 32), WeightScheme(4))
    with pytest.raises(RuntimeError, match="read-only"):
        layer.weight.data += 1
    with pytest.raises(RuntimeError, match="read-only"):
        layer.weight.data = torch.zeros(32, 32)


def test_gradients_reach_the_input():
    layer = PackedLinear.like(nn.Linear(48, 24), WeightScheme(4, 16)).fill(*integers(4))
    x = torch.randn(2, 48, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1))


def test_tokens_have_their_own_8_bit_grid():
    x = torch.tensor([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_per_token(x), torch.tensor([[1.27, -0.63, 0.0], [0.0, 0.0, 0.0]]))
    y = round_to_range(torch.tensor([-3.0, 0.004, 0.006, 9.0]), -0.55, 2.0)
    torch.testing.assert_close(y, torch.tensor([-0.55, 0.0, 0.01, 2.0]))


def test_integer_products_equal_rounded_activations():
    linear = nn.Linear(48, 24)
    scheme = WeightScheme(8, -1, symmetric=True, activation_bits=8)
    rounded = round_to_nearest(linear.weight.detach(), scheme)
    layer = PackedLinear.like(linear, scheme).fill(rounded.q, rounded.scales, rounded.zero_points)
    assert layer.is_int8
    x = torch.randn(4, 7, 48)
    expected = torch.nn.functional.linear(round_per_token(x), layer.dequantize(), linear.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - linear(x)).norm() < 0.02 * linear(x).norm()


def test_schemes_are_checked_and_come_back_from_json():
    scheme = WeightScheme(3, 64, activation_bits=8, activation_range=(-1.0, 2.0))
    assert WeightScheme.from_dict({**scheme.to_dict(), "activation_range": [-1.0, 2.0]}, "m") == scheme
    assert WeightScheme(4).to_dict() == {"bits": 4}
    for bad in (dict(bits=5), dict(bits=4, group_size=0), dict(bits=4, scale_dtype="int8"),
                dict(bits=4, activation_bits=4), dict(bits=4, activation_range=(0, 1))):  # fmt: skip
        with pytest.raises(ValueError):
            WeightScheme(**bad)
    assert [auto_group_size(k) for k in (768, 576, 96, 100)] == [128, 64, 32, -1]


def test_a_symmetric_weight_refuses_other_zero_points():
    q, scales, zeros = integers(4)
    with pytest.raises(ValueError, match="symmetric"):
        PackedLinear.like(nn.Linear(48, 24), WeightScheme(4, 16, symmetric=True)).fill(q, scales, zeros)
