"""A block-sparse layer computes, and learns, what the dense layer with the same zeros does."""

import copy
import pickle

import pytest
import torch
from helpers import TASKS, default_task, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from silence import logits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.packed_blocks import stored_blocks
from hf_compress.measuring.counting import num_parameters
from hf_compress.model.anatomy import anatomy

WIDE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
FAMILIES = {"bert": WIDE, "llama": dict(WIDE, head_dim=16, num_key_value_heads=2), "modernbert": WIDE,
            "gpt2": dict(n_embd=64, n_head=4)}  # fmt: skip


def blocky(weight: Tensor, block_size: int, share: float, seed: int = 0) -> Tensor:
    """`weight` (N, K) with a random share of its blocks set to zero."""
    N, K = weight.shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(-(-N // block_size), -(-K // block_size), generator=generator) >= share
    return weight * mask.repeat_interleave(block_size, 0)[:N].repeat_interleave(block_size, 1)[:, :K]


def block_pruned(family: str, block_size: int = 16, share: float = 0.6) -> nn.Module:
    model = tiny_model(family, **FAMILIES[family])
    for i, layer in enumerate(anatomy(model).layers):
        for name, module in layer.module.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight.data = blocky(module.weight.data, block_size, share, seed=i + len(name))
    return model


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["linear", "conv1d"])
@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize("shape", [(64, 32), (40, 56), (16, 100)], ids=str)
def test_outputs_and_all_gradients_equal_those_of_the_dense_twin(kind, block_size, shape):
    N, K = shape
    dense = (nn.Linear(K, N) if kind is nn.Linear else Conv1D(N, K)).double()
    weight = blocky(dense.weight.data if kind is nn.Linear else dense.weight.data.T, block_size, 0.5)
    dense.weight.data = weight if kind is nn.Linear else weight.T.contiguous()
    mask = stored_blocks(weight, block_size)
    sparse = BlockSparseLinear.from_dense(copy.deepcopy(dense), mask, (block_size, block_size))
    x = torch.randn(3, 5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (dense, sparse):
        input = x.clone().requires_grad_()
        output = layer(input)
        output.square().sum().backward()
        results.append((output.detach(), input.grad, layer.bias.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    gradient = dense.weight.grad if kind is nn.Linear else dense.weight.grad.T
    twin = BlockSparseLinear.from_dense(copy.deepcopy(dense), mask, (block_size, block_size))
    twin.values.data = sparse.values.grad
    stored = twin.weight.as_subclass(Tensor)
    side = max(block_size, 16)
    inside = (
        stored_blocks(torch.where(weight != 0, 1.0, 0.0), side).repeat_interleave(side, 0).repeat_interleave(side, 1)
    )
    torch.testing.assert_close(stored, gradient * inside[:N, :K])
    assert torch.equal(sparse.weight.as_subclass(Tensor), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_pruned_model_keeps_its_outputs_and_comes_back_bit_for_bit(family, tmp_path):
    model = block_pruned(family)
    dense, size = logits(model), num_parameters(model)
    assert hfc.to_block_sparse(model, 16) is model
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert num_parameters(model) < size
    assert any(isinstance(module, BlockSparseLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded, info = TASKS[default_task(family)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.is_quantized
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    loaded.half().float()


def test_empty_heads_and_neurons_are_cut_before_blocks_are_stored(tmp_path):
    model = block_pruned("bert", share=0.3)
    first, second = anatomy(model).layers[:2]
    first.attention.output.weight.data[:, 16:48] = 0  # heads 1 and 2 of 16
    first.feed_forward.output.weight.data[:, :32] = 0  # two blocks of neurons
    second.feed_forward.output.weight.data[:, 3] = 0  # a single neuron is no whole block
    dense = logits(model)
    hfc.to_block_sparse(model, 16)
    first, second = anatomy(model).layers[:2]
    assert (first.attention.num_heads, first.feed_forward.num_neurons) == (2, 64)
    assert second.feed_forward.num_neurons == 96
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(TASKS["classification"].from_pretrained(tmp_path)), logits(model))


def test_the_file_holds_the_blocks_and_little_more(tmp_path):
    model = block_pruned("bert", share=0.75)
    modules = [m for layer in anatomy(model).layers for m in layer.module.modules() if isinstance(m, nn.Linear)]
    dense_bytes = sum(4 * module.weight.numel() for module in modules)
    expected = sum(4 * 16 * 16 * int(stored_blocks(module.weight, 16).sum()) for module in modules)
    hfc.to_block_sparse(model, 16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = ("values", "crow_indices", "col_indices")
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.rpartition(".")[2] in names)
    assert stored <= 1.02 * expected
    assert stored <= 0.27 * dense_bytes


def test_the_stock_trainer_trains_it_and_zeros_stay_away(tmp_path):
    hfc.to_block_sparse(block_pruned("bert"), 16).save_pretrained(tmp_path / "model")
    model = TASKS["classification"].from_pretrained(tmp_path / "model")
    ids = tiny_batch(model, batch=8, padding=False)["input_ids"]
    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=3, save_steps=3, use_cpu=True,
                             report_to="none", disable_tqdm=True, learning_rate=1e-2)  # fmt: skip
    layer = next(module for module in model.modules() if isinstance(module, BlockSparseLinear))
    before, zeros = layer.values.detach().clone(), layer.weight == 0
    Trainer(model, args, train_dataset=rows).train()
    assert not torch.equal(layer.values, before)
    assert bool((layer.weight[zeros] == 0).all())
    checkpoint = TASKS["classification"].from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert torch.equal(logits(checkpoint), logits(model.eval()))


def test_lora_on_top_comes_back_and_is_not_merged_into_a_copy(tmp_path):
    peft = pytest.importorskip("peft")
    hfc.to_block_sparse(block_pruned("bert"), 16).save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(TASKS["classification"].from_pretrained(tmp_path / "model"), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = TASKS["classification"].from_pretrained(tmp_path / "model")
    again = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(RuntimeError, match="read-only"):
        again.merge_and_unload()


MOVES = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "cast": lambda model: model.to(torch.bfloat16),
    "cast there and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_layer_whose_blocks_lie_elsewhere_is_compiled(move):
    """Graphs find a layer by where its blocks lie; where they lay, others may lie by now."""
    model = MOVES[move](hfc.to_block_sparse(block_pruned("bert"), 16)).eval()
    expected = logits(model)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**tiny_batch(model)).logits
    torch.testing.assert_close(found, expected)


def test_autocast_runs_it_in_the_lower_precision():
    module = nn.Linear(32, 32)
    layer = BlockSparseLinear.from_dense(module, torch.tensor([[True, False], [True, True]]), (16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 32)).dtype is torch.bfloat16


def test_surgery_and_a_second_conversion_are_refused():
    model = hfc.to_block_sparse(block_pruned("bert"), 16)
    for change in (lambda: hfc.prune_heads(model, {0: [0]}), lambda: hfc.prune_layers(model, [0])):
        with pytest.raises(ValueError, match="quantized or block-sparse"):
            change()
    with pytest.raises(ValueError, match="block-sparse already"):
        hfc.to_block_sparse(model, 16)


@pytest.mark.parametrize("block_size", [0, 5, 256, -16])
def test_other_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="block_size must be one of"):
        hfc.to_block_sparse(tiny_model("bert"), block_size)


NAME = "encoder.layer.0.attention.self.query"
BROKEN = {
    "block-size": (lambda part: part[NAME].update(block_size=[5, 5]), "two sides among"),
    "too-many-blocks": (lambda part: part[NAME].update(num_blocks=10**6), "has no 1000000 blocks"),
    "negative": (lambda part: part[NAME].update(num_blocks=-1), "must be a number of blocks"),
    "format": (lambda part: part[NAME].update(format="pickle"), "format 'bsr'"),
    "unknown-module": (lambda part: part.update({"encoder.x": part[NAME]}), "has no module 'encoder.x'"),
    "no-linear": (lambda part: part.update({"embeddings.LayerNorm": part[NAME]}), "cannot be stored in blocks so"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_refused(change, message, tmp_path):
    model = hfc.to_block_sparse(block_pruned("bert"), 16)
    change(model.config.quantization_config["sparsity"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        TASKS["classification"].from_pretrained(tmp_path)


def test_indices_that_would_read_out_of_bounds_are_refused_by_name(tmp_path):
    hfc.to_block_sparse(block_pruned("bert"), 16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"bert.{NAME}.col_indices"][0] = 1000
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"bert\.{NAME}: col_indices"):
        TASKS["classification"].from_pretrained(tmp_path)
