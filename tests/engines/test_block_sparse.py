"""The gathered block-sparse product against float64, and that its layout follows the blocks."""

import gc

import pytest
import torch
from torch import Tensor, nn

from hf_compress.engines import block_sparse, kept, processor
from hf_compress.layers.block_sparse import BlockSparseLinear

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)


def uneven_mask(rows: int, cols: int) -> Tensor:
    """Rows without a block, with one, with all of them, and with numbers in between."""
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.8, rows)[:, None]
    mask[0], mask[1], mask[2] = False, False, True
    mask[1, 0] = True
    return mask


def sparse_layer(N: int, K: int, block_size: tuple[int, int], dtype: torch.dtype, mask: Tensor) -> BlockSparseLinear:
    torch.manual_seed(0)
    return BlockSparseLinear.from_dense(nn.Linear(K, N, dtype=dtype), mask, block_size)


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [(16, 16), (32, 32), (64, 16)], ids=["16x16", "32x32", "64x16"])
@pytest.mark.parametrize(("N", "K"), [(256, 384), (250, 379)], ids=["whole-blocks", "cut-blocks"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gathering_keeps_its_error_bound(N, K, block_size, dtype, bias, monkeypatch):
    monkeypatch.setattr(block_sparse, "SLICE_BYTES", 1 << 14)  # several slices a bucket
    layer = sparse_layer(N, K, block_size, dtype, uneven_mask(-(-N // block_size[0]), -(-K // block_size[1])))
    weight, offset = layer._sparse(layer.values.detach()), layer.bias.detach() if bias else None
    parts = block_sparse.buckets(weight)
    assert len(parts) <= block_sparse.BUCKETS
    for M in (1, 7, 40):
        x = torch.randn(M, K).to(dtype)
        oracle = x.double() @ layer.weight.as_subclass(Tensor).detach().double().t()
        oracle = oracle + offset.double() if bias else oracle
        y = block_sparse._gathered(x, weight, parts, offset)
        assert y.shape == (M, N) and y.is_contiguous()
        assert float((y.double() - oracle).norm() / oracle.norm()) <= BOUNDS[dtype]
        assert torch.equal(block_sparse._gathered(x, weight, parts, offset), y)


def test_rows_of_one_bucket_keep_their_places():
    mask = torch.eye(8)
    mask[0, 1] = 1  # the first row is the fullest, and sorts last
    layer = sparse_layer(256, 256, (32, 32), torch.float32, mask)
    weight, x = layer._sparse(layer.values.detach()), torch.randn(5, 256)
    for count in (1, 2):
        parts = block_sparse.buckets(weight) if count == 2 else [merged(weight)]
        y = block_sparse._gathered(x, weight, parts, None)
        torch.testing.assert_close(y, x @ layer.weight.as_subclass(Tensor).detach().t())


def merged(weight) -> block_sparse.Bucket:
    """All rows in one bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sparse, "BUCKETS", 1)
        (bucket,) = block_sparse.buckets(weight)
    return bucket


def test_padding_stays_small_for_uneven_rows():
    layer = sparse_layer(1024, 1024, (16, 16), torch.float32, uneven_mask(64, 64))
    parts = block_sparse.buckets(layer._sparse(layer.values.detach()))
    multiplied = sum(part.blocks.numel() for part in parts)
    assert multiplied <= 1.35 * layer.values.numel()  # one bucket for all would be 2.5


def test_a_weight_without_blocks_gives_the_bias():
    layer = sparse_layer(256, 256, (16, 16), torch.float32, torch.zeros(16, 16))
    with torch.no_grad():
        assert torch.equal(layer(torch.randn(3, 256)), layer.bias.expand(3, -1))


def engines_of(layer: BlockSparseLinear) -> dict:
    return kept._kept[id(layer.values)][1]


@pytest.mark.parametrize(("share", "used"), [(0.05, "buckets"), (0.95, "dense")], ids=["sparse", "nearly-dense"])
def test_dense_where_dense_is_faster(share, used):
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < share
    layer = sparse_layer(256, 256, (16, 16), torch.float32, mask)
    with torch.no_grad():
        layer(torch.randn(8, 256))
    assert list(engines_of(layer)) == [used]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_one_token_goes_through_mkl_and_the_blocks_can_still_go(bias):
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(2)) < 0.2
    layer, x = sparse_layer(512, 256, (32, 32), torch.float32, mask), torch.randn(1, 256)
    layer.bias = layer.bias if bias else None
    oracle = x.double() @ layer.weight.as_subclass(Tensor).detach().double().t()
    oracle = oracle + layer.bias.detach().double() if bias else oracle
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(layer(x), y)
    assert list(engines_of(layer)) == ["mkl"]
    assert float((y.double() - oracle).norm() / oracle.norm()) <= BOUNDS[torch.float32]
    key, made = id(layer.values), engines_of(layer)
    del layer
    gc.collect()
    assert key not in kept._kept or kept._kept[key][1] is not made


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
    assert id(small.values) not in kept._kept and id(layer.values) not in kept._kept
