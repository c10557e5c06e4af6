"""Low-bit linear layers on CPU: the plain body against the float64 product of the stored integers."""

import pytest
import torch
from hf_compress_kernels import (
    gptq_repack,
    pack_gptq,
    pack_zeros,
    wna16_dequant,
    wna16_linear,
    wna16_pack,
    wna16_unpack,
)

from tests.kernels.oracle import BOUNDS, random_layer, relative_error
from tests.kernels.test_packing import read_bit_stream

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
SHAPES = pytest.mark.parametrize(
    ("N", "K", "group_size"),
    [(64, 128, 32), (96, 576, 64), (128, 1000, 128), (70, 40, -1), (64, 192, 96)],
    ids=["one-tile", "64-wide-tiles", "short-last-group", "one-group", "groups-across-tiles"],
)


def packed(layer, bits, group_size, dtype=torch.float16, act_order=False):
    g_idx = layer.g_idx if act_order else None
    return wna16_pack(layer.ints, layer.scales, layer.zeros, bits, group_size, dtype, g_idx)


@BITS
@DTYPES
@SHAPES
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_linear_matches_the_float64_product(bits, dtype, N, K, group_size, act_order):
    layer = random_layer(bits, N, K, group_size, act_order)
    weight = packed(layer, bits, group_size, dtype, act_order)
    x = torch.randn(2, 3, K, dtype=dtype)
    bias = layer.bias.to(dtype)
    expected = x.double() @ layer.weight(dtype).T + bias.double()
    assert relative_error(wna16_linear(x, weight, bias), expected) < BOUNDS[dtype]


@BITS
@DTYPES
@SHAPES
def test_packing_is_undone_exactly(bits, dtype, N, K, group_size):
    layer = random_layer(bits, N, K, group_size, act_order=True)
    ints, scales, zeros = wna16_unpack(packed(layer, bits, group_size, dtype, act_order=True))
    assert torch.equal(ints, layer.ints)
    assert torch.equal(scales, layer.scales.to(dtype))
    assert torch.equal(zeros, layer.zeros.to(dtype))


@BITS
@pytest.mark.parametrize("zero_offset", [0, 1], ids=["v2", "v1"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_repacked_checkpoint_equals_an_independent_reader(bits, zero_offset, act_order):
    N, K, group_size = 64, 256, 64
    layer = random_layer(bits, N, K, group_size, act_order)
    qweight, qzeros = pack_gptq(layer.ints, bits), pack_zeros(layer.zeros, bits, zero_offset)
    scales = layer.scales.half()
    weight = gptq_repack(qweight, qzeros, scales, layer.g_idx, bits, zero_offset, torch.float16)

    ints = torch.from_numpy(read_bit_stream(qweight.T.numpy(), bits, K))
    zeros = (torch.from_numpy(read_bit_stream(qzeros.numpy(), bits, N)) + zero_offset) % (1 << bits)
    columns = layer.g_idx.long()
    expected = (ints - zeros[columns].T).double() * scales.double()[columns].T
    torch.testing.assert_close(wna16_dequant(weight).double(), expected, rtol=2**-11, atol=0)  # one fp16 rounding
    x = torch.randn(5, K, dtype=torch.float16)
    assert relative_error(wna16_linear(x, weight), x.double() @ expected.T) < BOUNDS[torch.float16]


def test_sorted_groups_need_no_permutation():
    layer = random_layer(4, 64, 128, 32)
    assert packed(layer, 4, 32, act_order=True).perm is None


def test_negative_group_indices_count_from_the_end():
    layer = random_layer(4, 64, 128, 32, act_order=True)
    wrapped = wna16_pack(*layer[:3], 4, 32, torch.float16, g_idx=layer.g_idx - 4)
    assert torch.equal(wna16_dequant(wrapped), wna16_dequant(packed(layer, 4, 32, act_order=True)))


def test_empty_and_strided_inputs():
    layer = random_layer(4, 64, 128, 32)
    weight = packed(layer, 4, 32, torch.float32)
    assert wna16_linear(torch.empty(0, 128), weight).shape == (0, 64)
    x = torch.randn(128, 6).t()
    assert torch.equal(wna16_linear(x, weight), wna16_linear(x.contiguous(), weight))


def test_gradients_of_input_and_bias():
    layer = random_layer(4, 64, 64, 32, act_order=True)
    weight = packed(layer, 4, 32, torch.float32, act_order=True)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    bias = layer.bias.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: wna16_linear(x, weight, b), (x, bias))


def test_scales_are_frozen():
    layer = random_layer(4, 64, 64, 32)
    weight = packed(layer, 4, 32, torch.float32)
    weight = weight._replace(sz=weight.sz.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="packed weights are frozen"):
        wna16_linear(torch.randn(2, 64), weight)


class TestBadInput:
    layer = random_layer(4, 64, 128, 32)
    weight = packed(layer, 4, 32)
    x = torch.zeros(1, 128, dtype=torch.float16)

    def pack(self, **changes):
        args = dict(ints=self.layer.ints, scales=self.layer.scales, zeros=self.layer.zeros, bits=4, group_size=32,
                    dtype=torch.float16)  # fmt: skip
        return wna16_pack(**{**args, **changes})

    def test_calls(self):
        with pytest.raises(ValueError, match="x must be torch.float16"):
            wna16_linear(self.x.bfloat16(), self.weight)
        with pytest.raises(ValueError, match="in_features=128"):
            wna16_linear(self.x[:, :64], self.weight)
        with pytest.raises(ValueError, match=r"bias must be \(64,\)"):
            wna16_linear(self.x, self.weight, torch.zeros(32, dtype=torch.float16))
        with pytest.raises(ValueError, match="one device, got x on meta"):
            wna16_linear(self.x.to("meta"), self.weight)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(bits=5), "bits must be one of"),
            (dict(group_size=8), "group_size must be a multiple of"),
            (dict(group_size=0), "must be positive"),
            (dict(group_size=64), r"scales must be \(groups, out_features\) = \(2, 64\)"),
            (dict(ints=torch.full((64, 128), 16)), r"ints must lie in \[0, 15\]"),
            (dict(zeros=torch.full((4, 64), 16)), r"zeros must lie in \[0, 15\]"),
            (dict(dtype=torch.int8), "Activations must be"),
            (dict(scales=torch.full((4, 64), 1e6)), "do not fit torch.float16"),
            (dict(scales=torch.full((4, 64), 1e-12)), "do not fit torch.float16"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_packing(self, changes, message):
        if "group_size" in changes and changes["group_size"] == 8:
            changes = dict(changes, scales=torch.ones(16, 64), zeros=torch.zeros(16, 64))
        with pytest.raises(ValueError, match=message):
            self.pack(**changes)

    @pytest.mark.parametrize("entry", [4, 1000, 2**31 - 1, -5, -(2**31)], ids=str)
    def test_group_index_out_of_range(self, entry):
        g_idx = self.layer.g_idx.clone()
        g_idx[7] = entry
        with pytest.raises(ValueError, match=r"g_idx must lie in \[0, 4\)"):
            self.pack(g_idx=g_idx)

    def test_group_index_of_the_wrong_kind(self):
        with pytest.raises(ValueError, match=r"g_idx must be \(128,\) integers"):
            self.pack(g_idx=self.layer.g_idx[:-1])
        with pytest.raises(ValueError, match="32 columns in each group"):
            self.pack(g_idx=torch.zeros(128, dtype=torch.int32))

    def test_checkpoint_of_disagreeing_shapes(self):
        qweight, qzeros = pack_gptq(self.layer.ints, 4), pack_zeros(self.layer.zeros, 4)
        args = dict(qweight=qweight, qzeros=qzeros, scales=self.layer.scales, g_idx=None, bits=4, zero_offset=0,
                    dtype=torch.float16)  # fmt: skip
        for name, value, message in [
            ("scales", self.layer.scales[:, :32], "disagree"),
            ("scales", self.layer.scales[0], "must be matrices"),
            ("qzeros", qzeros[:, :2], "take 8 words, got 2"),
            ("g_idx", self.layer.g_idx[:64], "take 8 words, got 16"),
            ("g_idx", torch.full((128,), 9), r"must lie in \[0, 4\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                gptq_repack(**{**args, name: value})
