"""Block-sparse linear layers against a dense twin made from the same mask: output and every gradient."""

import pytest
import torch
from hf_compress_kernels import bsr_from_dense, bsr_linear, bsr_to_dense, bsr_weight

from tests.kernels.oracle import BOUNDS, on, plain_only, relative_error

SIZES = pytest.mark.parametrize(
    "block_size", [(16, 16), (32, 32), (64, 64), (128, 128), (32, 64), (128, 16)], ids="{0[0]}x{0[1]}".format
)


def entries(block_mask, block_size, N, K):
    """The mask of single weights, (N, K)."""
    return block_mask.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)[:N, :K]


def sparse_layer(block_size, N=160, K=200, density=0.4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    block_mask = torch.rand(-(-N // block_size[0]), -(-K // block_size[1]), generator=generator) < density
    dense = torch.randn(N, K, generator=generator).to(dtype) * entries(block_mask, block_size, N, K)
    return bsr_from_dense(dense, block_mask, block_size), dense, block_mask


@SIZES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_product_equals_the_dense_twin(block_size, dtype, device):
    weight, dense, _ = sparse_layer(block_size, dtype=dtype)
    x, bias = torch.randn(2, 9, 200, dtype=dtype), torch.randn(160, dtype=dtype)
    expected = x.double() @ dense.double().T + bias.double()
    assert relative_error(bsr_linear(*on(device, (x, weight, bias))), expected) < BOUNDS[dtype]


def test_a_strided_bias_is_read_where_it_lies(device):
    weight, dense, _ = sparse_layer((16, 16))
    x, bias = torch.randn(3, 200), torch.randn(160, 3)
    expected = x.double() @ dense.double().T + bias[:, 1].double()
    y = bsr_linear(x.to(device), on(device, weight), bias.to(device)[:, 1])
    assert relative_error(y, expected) < BOUNDS[torch.float32]


@SIZES
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0], ids="density={}".format)
def test_gradients_equal_the_dense_twin(block_size, density, device):
    weight, dense, block_mask = sparse_layer(block_size, density=density)
    values = weight.values.clone().to(device).requires_grad_()
    x = torch.randn(33, 200).to(device).requires_grad_()
    bias = torch.randn(160).to(device).requires_grad_()
    grad = torch.randn(33, 160)
    bsr_linear(x, on(device, weight)._replace(values=values), bias).backward(grad.to(device))
    kept = entries(block_mask, block_size, 160, 200)
    product = grad.double().T @ x.detach().double().cpu()
    expected_values = bsr_from_dense(product * kept, block_mask, block_size).values
    torch.testing.assert_close(x.grad.double().cpu(), grad.double() @ dense.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values.grad.double().cpu(), expected_values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad.cpu(), grad.sum(0))


@SIZES
def test_dense_round_trip(block_size):
    weight, dense, _ = sparse_layer(block_size)
    assert torch.equal(bsr_to_dense(weight), dense)


def test_empty_rows_give_the_bias_and_empty_columns_no_gradient():
    block_mask = torch.ones(5, 5, dtype=torch.bool)
    block_mask[2], block_mask[:, 1] = False, False
    weight = bsr_from_dense(torch.randn(80, 80), block_mask, (16, 16))
    x, bias = torch.randn(7, 80, requires_grad=True), torch.randn(80)
    y = bsr_linear(x, weight, bias)
    y.sum().backward()
    assert torch.equal(y[:, 32:48], bias[32:48].expand(7, -1))
    assert x.grad[:, 16:32].eq(0).all()
    assert x.grad[:, :16].ne(0).any()


@pytest.mark.parametrize("side", [4, 8])
def test_fine_blocks_run_inside_blocks_of_16(side):
    block_mask = torch.zeros(48 // side, 64 // side, dtype=torch.bool)
    block_mask[0, 0] = True
    dense = torch.randn(48, 64)
    weight = bsr_from_dense(dense, block_mask, (side, side))
    assert weight.values.shape == (1, 16, 16)
    assert weight.density == 256 / (48 * 64)
    assert torch.equal(bsr_to_dense(weight), dense * entries(block_mask, (side, side), 48, 64))


def test_density_is_the_share_of_blocks_also_where_the_last_ones_are_padded():
    """A weight of 17 x 33 has 2 x 3 blocks of 16: together a share of 1, though they hold 1536 of 561 entries."""
    whole = bsr_from_dense(torch.randn(17, 33), torch.ones(2, 3, dtype=torch.bool), (16, 16))
    half = bsr_from_dense(torch.randn(17, 33), torch.tensor([[1, 1, 0], [0, 0, 1]]).bool(), (16, 16))
    assert whole.density == 1 and half.density == 0.5


def test_no_rows():
    weight, _, _ = sparse_layer((16, 16))
    assert bsr_linear(torch.empty(0, 200), weight).shape == (0, 160)


def test_same_bits_on_every_run(device):
    weight, _, _ = sparse_layer((32, 32), dtype=torch.float16)
    x, weight = on(device, (torch.randn(40, 200, dtype=torch.float16), weight))
    assert torch.equal(bsr_linear(x, weight), bsr_linear(x, weight))


@plain_only
def test_gradcheck():
    weight, dense, block_mask = sparse_layer((16, 16), N=32, K=48)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    values = weight.values.double().requires_grad_()
    bias = torch.randn(32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, v, b: bsr_linear(x, weight._replace(values=v), b), (x, values, bias), fast_mode=True
    )
    dense = dense.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda d: bsr_linear(x.detach(), bsr_from_dense(d, block_mask, (16, 16))), (dense,), fast_mode=True
    )


class TestBadIndex:
    """What a crafted checkpoint may hold is refused when the weight is made."""

    values = torch.zeros(3, 16, 16)
    crow = torch.tensor([0, 2, 3])
    col = torch.tensor([0, 2, 1])

    @pytest.mark.parametrize(
        ("crow", "message"),
        [
            ([0, 2], r"crow_indices must be \(3,\)"),
            ([1, 2, 3], "crow_indices must rise from 0"),
            ([0, 2, 4], "crow_indices must rise from 0"),
            ([0, 4, 3], "never fall"),
            ([0, -1, 3], "never fall"),
            ([0.0, 2.0, 3.0], "integers"),
        ],
        ids=["length", "start", "end", "falls", "negative", "float"],
    )
    def test_rows(self, crow, message):
        with pytest.raises(ValueError, match=message):
            bsr_weight(self.values, torch.tensor(crow), self.col, 32, 48)

    @pytest.mark.parametrize(
        ("col", "message"),
        [
            ([0, 2], r"col_indices must be \(3,\)"),
            ([0, 3, 1], r"col_indices must lie in \[0, 3\)"),
            ([0, 2, -1], r"col_indices must lie in \[0, 3\)"),
            ([2, 0, 1], "must rise within each block row"),
            ([1, 1, 1], "must rise within each block row"),
        ],
        ids=["length", "too-large", "negative", "unsorted", "repeated"],
    )
    def test_columns(self, col, message):
        with pytest.raises(ValueError, match=message):
            bsr_weight(self.values, self.crow, torch.tensor(col), 32, 48)

    def test_block_sizes_and_shapes(self):
        with pytest.raises(ValueError, match="sides among"):
            bsr_weight(torch.zeros(3, 16, 24), self.crow, self.col, 32, 48)
        with pytest.raises(ValueError, match="sides among"):
            bsr_from_dense(torch.zeros(32, 48), torch.ones(16, 24), (2, 2))
        with pytest.raises(ValueError, match=r"block_mask must be \(2, 3\)"):
            bsr_from_dense(torch.zeros(32, 48), torch.ones(3, 2), (16, 16))

    def test_calls(self):
        weight = bsr_weight(self.values, self.crow, self.col, 32, 48)
        with pytest.raises(ValueError, match="in_features=48"):
            bsr_linear(torch.zeros(1, 47), weight)
        with pytest.raises(ValueError, match="share a dtype"):
            bsr_linear(torch.zeros(1, 48, dtype=torch.float16), weight)
        with pytest.raises(ValueError, match=r"bias must be \(32,\)"):
            bsr_linear(torch.zeros(1, 48), weight, torch.zeros(48))
