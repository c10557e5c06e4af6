"""The Triton kernels of low-bit layers, in the interpreter or on a GPU, against the float64 product of the integers."""

import itertools

import pytest
import torch
from hf_compress_kernels import reference, wna16_dequant, wna16_linear, wna16_pack
from hf_compress_kernels.dispatch import INTERPRET
from hf_compress_kernels.tuning import TileConfig
from hf_compress_kernels.wna16_launch import launch_linear

from tests.kernels.oracle import BOUNDS, on, pair_cover, random_layer, relative_error


@pytest.fixture(autouse=True)
def _needs_kernels(device):
    if device.type == "cpu" and not INTERPRET:
        pytest.skip("runs under TRITON_INTERPRET=1, see test_interpreter.py")


BITS, GROUPS, DTYPES = (2, 3, 4, 8), (32, 64, 128, -1), (torch.float16, torch.bfloat16)
ROWS, FLAGS = (1, 2, 7, 8, 9, 16, 17, 33, 65), (False, True)
SMALL, LARGE = ((64, 128), (96, 576), (128, 1000)), ((768, 3072),)


def legal(case):
    _, group_size, _, _, (_, K), _, act_order = case
    return group_size <= K and not (act_order and group_size == -1)


def matrix(shapes):
    return list(filter(legal, itertools.product(BITS, GROUPS, DTYPES, ROWS, shapes, FLAGS, FLAGS)))


EVERYTHING = matrix(SMALL + LARGE)
COVER = pair_cover(matrix(SMALL))
WIDE = [  # of a layer as models have it, once for each number of bits; more rows are more of the same tiles
    (2, 32, torch.bfloat16, 2, *LARGE, False, True), (3, 64, torch.float16, 8, *LARGE, True, False),
    (4, 128, torch.bfloat16, 7, *LARGE, True, True), (8, -1, torch.float16, 1, *LARGE, False, False),
]  # fmt: skip
QUICK = COVER + WIDE


def case_id(case):
    bits, group_size, dtype, M, (N, K), bias, act_order = case
    return f"{bits}bit-g{group_size}-{str(dtype)[6:]}-M{M}-{N}x{K}{'-bias' * bias}{'-act' * act_order}"


def check(case, device):
    bits, group_size, dtype, M, (N, K), with_bias, act_order = case
    layer = random_layer(bits, N, K, group_size, act_order, seed=M)
    weight = wna16_pack(*layer[:3], bits, group_size, dtype, layer.g_idx if act_order else None)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = layer.bias.to(dtype) if with_bias else None
    expected = x.double() @ layer.weight(dtype).T
    if with_bias:
        expected += bias.double()
    assert relative_error(wna16_linear(*on(device, (x, weight, bias))), expected) < BOUNDS[dtype]


def test_every_pair_of_settings_is_among_the_quick_cases():
    for a, b in itertools.combinations(range(7), 2):
        assert {(case[a], case[b]) for case in COVER} == {(case[a], case[b]) for case in matrix(SMALL)}
    assert len(COVER) < 60


@pytest.mark.parametrize("case", QUICK, ids=case_id)
def test_linear(case, device):
    check(case, device)


@pytest.mark.long
@pytest.mark.parametrize("case", EVERYTHING, ids=case_id)
def test_linear_everywhere(case, device):
    check(case, device)


@pytest.mark.parametrize("bits", BITS, ids="{}-bit".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("act_order", FLAGS, ids=["in-order", "act-order"])
def test_dequantized_weight_has_the_bits_of_the_torch_formula(bits, dtype, act_order, device):
    layer = random_layer(bits, 96, 576, 64, act_order)
    weight = wna16_pack(*layer[:3], bits, 64, dtype, layer.g_idx if act_order else None)
    assert torch.equal(wna16_dequant(on(device, weight)).cpu(), reference.wna16_dequant(weight))


@pytest.mark.parametrize("bits", BITS, ids="{}-bit".format)
@pytest.mark.parametrize("fill", ["zeros", "ones"])
def test_extreme_words_and_scales(bits, fill, device):
    maxq = (1 << bits) - 1
    ints = torch.full((64, 256), 0 if fill == "zeros" else maxq, dtype=torch.uint8)
    zeros = maxq - ints[:2, :64]  # the largest difference: every weight is maxq or -maxq
    scales = torch.tensor([[6e-5], [200.0]]).expand(2, 64)
    weight = wna16_pack(ints, scales, zeros, bits, 128, torch.float16)
    x = torch.rand(3, 256).half() * 0.01
    dense = (ints.double() - zeros.double().T.repeat_interleave(128, 1)) * scales.half().double().T.repeat_interleave(
        128, 1
    )
    assert relative_error(wna16_linear(*on(device, (x, weight))), x.double() @ dense.T) < BOUNDS[torch.float16]


def arguments(device, bits=4, N=192, K=1024, M=5):
    layer = random_layer(bits, N, K, 128)
    weight = wna16_pack(*layer[:3], bits, 128, torch.float16)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).half()
    expected = x.double() @ layer.weight(torch.float16).T + layer.bias.half()
    return on(device, (x, weight, layer.bias.half())), expected


@pytest.mark.parametrize("split", [1, 2, 4, 8], ids="split-{}".format)
def test_split_over_k_sums_in_a_fixed_order(split, device):
    args, expected = arguments(device)
    config = TileConfig(8, 128, 4, 4, split_k=split)
    first = launch_linear(*args, config=config)
    assert relative_error(first, expected) < BOUNDS[torch.float16]
    assert torch.equal(first, launch_linear(*args, config=config))


@pytest.mark.parametrize(
    "config", [(16, 64, 4, 2, 1), (8, 128, 8, 3, 2), (64, 64, 4, 3, 1), (128, 128, 8, 3, 1)], ids=str
)
def test_every_tile_gives_the_product(config, device):
    args, expected = arguments(device, N=128, K=256, M=20)
    assert relative_error(launch_linear(*args, config=TileConfig(*config)), expected) < BOUNDS[torch.float16]


def test_many_rows_take_the_dequantized_path(monkeypatch, device):
    from hf_compress_kernels import tuning, wna16_launch

    args, expected = arguments(device, M=70)
    monkeypatch.setattr(tuning, "DEQUANT_FROM", {})
    monkeypatch.setattr(tuning, "DEQUANT_FROM_ELSEWHERE", 64)
    monkeypatch.setattr(wna16_launch, "SCRATCH_BYTES", 2 * 1024 * 64)  # one slab of 64 rows at a time
    assert relative_error(launch_linear(*args), expected) < BOUNDS[torch.float16]


def test_strided_rows_and_single_row_views(device):
    args, expected = arguments(device, M=5)
    x, *rest = args
    wide = torch.zeros(5, 2048, dtype=torch.float16, device=device)
    wide[:, :1024] = x
    assert torch.equal(launch_linear(wide[:, :1024], *rest), launch_linear(*args))
    assert torch.equal(launch_linear(x.t().contiguous().t(), *rest), launch_linear(*args))
    assert torch.equal(launch_linear(x[2:3], *rest), launch_linear(*args)[2:3])


def test_gradient_of_the_input(device):
    layer = random_layer(4, 64, 128, 32, act_order=True)
    weight = wna16_pack(*layer[:3], 4, 32, torch.float16, layer.g_idx)
    x = torch.randn(5, 128).half().to(device).requires_grad_()
    grad = torch.randn(5, 64).half()
    wna16_linear(x, on(device, weight)).backward(grad.to(device))
    assert relative_error(x.grad, grad.double() @ layer.weight(torch.float16)) < 1e-3  # the weight is rounded as well
