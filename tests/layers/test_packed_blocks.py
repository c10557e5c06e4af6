"""Packed layers that save only their blocks: the same layer before and after, and no file that is not what it says."""

import copy

import pytest
import torch
from helpers import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from silence import logits
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.layers.packed_blocks import PackedBlocksLinear, packed_blocks, stored_blocks
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model.anatomy import anatomy, is_projection, matrix
from hf_compress.quantization.grids import round_to_nearest
from hf_compress.quantization.modules import packed


def blocky(rows: int, columns: int, side: int, *, seed: int = 0) -> Tensor:
    """A weight (rows, columns) of which about two blocks in three are zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(-(-rows // side), -(-columns // side), generator=generator) < 1 / 3
    mask = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
    return torch.randn(rows, columns, generator=generator) * mask


def layer(weight: Tensor, **scheme) -> PackedLinear:
    module = nn.Linear(*weight.shape[::-1])
    module.weight.data = weight
    scheme = WeightScheme(**scheme)
    return packed(module, round_to_nearest(weight, scheme), scheme)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "side"), [((32, 64), 8), ((64, 96), 16), ((50, 72), 16), ((36, 20), 4)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_only_blocks_are_saved_and_come_back_as_the_same_weight(bits, shape, side, symmetric):
    weight = blocky(*shape, side)
    whole = layer(weight, bits=bits, symmetric=symmetric)
    made = PackedBlocksLinear.of(copy.deepcopy(whole), side)
    state = made.state_dict()
    assert "qweight" not in state and state["qblocks"].numel() < whole.qweight.numel()
    # the reference: each block of the dequantized weight, one after the other
    blocks = 0
    for row in range(0, shape[0], side):
        for column in range(0, shape[1], side):
            blocks += bool(whole.dequantize()[row : row + side, column : column + side].any())
    assert made.num_blocks == blocks == len(state["col_indices"]) == int(state["crow_indices"][-1])
    assert state["qblocks"].numel() == -(-blocks * side**2 * bits // 32)
    other = PackedBlocksLinear.of(layer(blocky(*shape, side, seed=1), bits=bits, symmetric=symmetric), side)
    other.load_state_dict(state)
    empty = PackedBlocksLinear.loading(PackedLinear(*shape[::-1], whole.scheme), side, blocks)
    for name, tensor in state.items():
        setattr(empty, name, nn.Parameter(tensor) if name == "bias" else tensor)
    empty.check("layer")
    for found in (made, other, empty):
        assert torch.equal(found.dequantize(), whole.dequantize()) and torch.equal(found.qweight, whole.qweight)
    x = torch.randn(3, shape[1])
    assert torch.equal(made(x), whole(x))


def test_a_layer_that_would_not_be_smaller_stays_whole():
    assert PackedBlocksLinear.of(layer(torch.randn(32, 32), bits=4), 8) is None
    nearly = blocky(32, 32, 4)
    nearly[:, :28] = torch.randn(32, 28)
    assert PackedBlocksLinear.of(layer(nearly, bits=2), 4) is None  # the indices take more than the zeros


def test_blocks_of_a_weight_by_hand():
    weight = torch.zeros(5, 6)
    weight[0, 5], weight[4, 0] = 1.0, -2.0
    assert stored_blocks(weight, 4).tolist() == [[False, True], [True, False]]


def block_pruned(family: str = "bert", side: int = 16) -> nn.Module:
    model = tiny_model(family)
    for number, module in enumerate(layer_maps(model)):
        weight = module.weight.data
        weight.copy_(blocky(*weight.shape, side, seed=number))
    return model


def layer_maps(model: nn.Module) -> list[nn.Module]:
    return [m for part in anatomy(model).layers for m in part.module.modules() if getattr(m, "weight", None) is not None
            and m.weight.dim() == 2]  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_block_sparse_layers_are_quantized_and_keep_their_blocks(family, tmp_path, monkeypatch):
    """Each weight is the dense one rounded; layers that stayed float would pass for it in silence."""
    monkeypatch.setenv("HF_COMPRESS_CPU", "exact")
    model = hfc.to_block_sparse(block_pruned(family), 16)
    names = set(model.config.quantization_config["sparsity"])
    scheme = WeightScheme(bits=4)
    expected = {
        name: round_to_nearest(matrix(module).detach().clone(), scheme).dequantize()
        for name, module in model.named_modules()
        if is_projection(module) and (".layer" in name or ".h." in name) and matrix(module).numel()
    }
    hfc.quantize(model, 4, group_size=-1)
    batch = tiny_batch(model)
    found = {name: module.dequantize() for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    record = model.config.quantization_config
    assert {entry["format"] for entry in record["sparsity"].values()} == {"packed"}
    assert record["sparsity"].keys() <= names <= record["bits"].keys() and len(packed_blocks(model)) > 4
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    assert loaded.config.quantization_config == record and packed_blocks(loaded).keys() == packed_blocks(model).keys()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, module in packed_blocks(loaded).items():
        assert f"{name}.qweight" not in stored and stored[f"{name}.qblocks"].numel() < module.qweight.numel()
    plain = loaded.dequantize()
    assert "sparsity" not in getattr(plain.config, "quantization_config", {})
    plain.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_what_is_skipped_stays_in_blocks_and_what_would_fill_them_is_refused(tmp_path):
    model = hfc.to_block_sparse(block_pruned(), 16)
    before = logits(model)
    for options in ({"method": "gptq", "calibration": [tiny_batch(model)]}, {"grid": "kmeans"}):
        with pytest.raises(ValueError, match="Blocks of zeros stay zeros on a uniform grid"):
            hfc.quantize(model, 4, **options)
        assert torch.equal(logits(model), before)
    hfc.quantize(model, 8, skip_modules=[".*attention.*"])
    formats = {name: entry["format"] for name, entry in model.config.quantization_config["sparsity"].items()}
    assert {"bsr", "packed"} == set(formats.values())
    assert all(("attention" in name) == (kind == "bsr") for name, kind in formats.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def damaged(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        prefix = max((n for n in tensors if n.endswith(".qblocks")), key=lambda n: len(tensors[n])).rpartition(".")[0]
        change(tensors, prefix)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def swap(name, make):
    def change(tensors, prefix):
        tensors[f"{prefix}.{name}"] = make(tensors[f"{prefix}.{name}"])

    return damaged(change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap("col_indices", lambda t: t + 9), "col_indices must rise within each block row and lie in"),
        (swap("col_indices", torch.zeros_like), "col_indices must rise within each block row"),
        (swap("crow_indices", lambda t: t.flip(0)), "crow_indices must rise from 0"),
        (swap("qblocks", lambda t: t[:-1].contiguous()), "qblocks has the shape"),
        (swap("qblocks", lambda t: t.float()), "qblocks must hold torch.int32"),
    ],
    ids=["beyond", "falling", "rows", "short", "float"],
)
def test_damaged_blocks_are_named(damage, message, tmp_path):
    hfc.quantize(hfc.to_block_sparse(block_pruned(), 16), 4).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(tiny_model("bert")).from_pretrained(tmp_path)
