"""The block-sparse products against float64, and that what is kept follows the blocks."""

import pytest
import torch
from torch import Tensor, nn

from hf_compress.engines import block_sparse, processor
from hf_compress.layers.block_sparse import BlockSparseLinear

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)


def uneven_mask(rows: int, cols: int) -> Tensor:
    """Rows without a block, with one, with numbers in between, and with all of them."""
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.8, rows)[:, None]
    mask[0] = False
    mask[1:3] = torch.eye(2, cols, dtype=torch.bool)[: rows - 1]
    mask[-1] = True
    return mask


def sparse_layer(N: int, K: int, block_size: tuple[int, int], dtype: torch.dtype, mask: Tensor) -> BlockSparseLinear:
    torch.manual_seed(0)
    return BlockSparseLinear.from_dense(nn.Linear(K, N, dtype=dtype), mask, block_size)


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [(16, 16), (32, 32), (128, 128)], ids=["16x16", "32x32", "128x128"])
@pytest.mark.parametrize(("N", "K"), [(256, 384), (250, 379)], ids=["whole-blocks", "cut-blocks"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_stored_blocks_keep_their_error_bound(N, K, block_size, dtype, bias, monkeypatch):
    monkeypatch.setattr(block_sparse, "is_amd", lambda: bias)  # elsewhere tokens are filled up to whole sixteens
    layer = sparse_layer(N, K, block_size, dtype, uneven_mask(-(-N // block_size[0]), -(-K // block_size[1])))
    weight, offset = layer._sparse(layer.values.detach()), layer.bias.detach() if bias else None
    for M in (1, 7, 40):
        x = torch.randn(M, K).to(dtype)
        oracle = x.double() @ layer.weight.as_subclass(Tensor).detach().double().t()
        oracle = oracle + offset.double() if bias else oracle
        run = block_sparse.StoredBlocks(weight)
        y = run(x, offset)
        assert y.shape == (M, N) and y.is_contiguous()
        assert float((y.double() - oracle).norm() / oracle.norm()) <= BOUNDS[dtype]
        assert torch.equal(run(x, offset), y)


@torch.no_grad()
def test_other_blocks_are_multiplied_dense():
    layer = sparse_layer(256, 256, (64, 16), torch.float32, torch.eye(4, 16))
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight.as_subclass(Tensor), layer.bias))
    assert layer._made[2].name == "float32"


def test_a_weight_without_blocks_gives_the_bias():
    layer = sparse_layer(256, 256, (16, 16), torch.float32, torch.zeros(16, 16))
    with torch.no_grad():
        assert torch.equal(layer(torch.randn(3, 256)), layer.bias.expand(3, -1))


@pytest.mark.parametrize(
    ("share", "used"), [(0.05, "stored blocks"), (0.95, "float32")], ids=["sparse", "nearly-dense"]
)
def test_dense_where_dense_is_faster(share, used):
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < share
    layer = sparse_layer(256, 256, (16, 16), torch.float32, mask)
    with torch.no_grad():
        layer(torch.randn(8, 256))
    assert layer._made[2].name == used


def test_bfloat16_is_dense_where_it_is_fast(monkeypatch):
    layer = sparse_layer(512, 512, (32, 32), torch.bfloat16, torch.eye(16))
    weight = layer._sparse(layer.values.detach())
    monkeypatch.setattr(block_sparse, "BFloat16", lambda weight: "dense")
    for fast, made in ((True, "dense"), (False, "stored blocks")):
        monkeypatch.setattr(processor, "has_bfloat16", lambda fast=fast: fast)
        run = block_sparse.make_run(weight, layer.density)
        assert getattr(run, "name", run) == made


def test_a_training_step_changes_the_product():
    layer = sparse_layer(256, 256, (32, 32), torch.float32, torch.eye(8))
    x = torch.randn(4, 256, requires_grad=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.weight.as_subclass(Tensor), layer.bias))
        y.square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight.as_subclass(Tensor), layer.bias))


def test_reference_mode_and_small_layers_use_the_plain_path(monkeypatch):
    layer, x = sparse_layer(256, 256, (32, 32), torch.float32, torch.eye(8)), torch.randn(4, 256)
    small = sparse_layer(64, 64, (16, 16), torch.float32, torch.eye(4))
    with torch.no_grad():
        small(x[:, :64])
        monkeypatch.setenv(processor.VARIABLE, "reference")
        layer(x)
    assert small._made[2] is None and layer._made[2] is None
