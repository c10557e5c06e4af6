"""Small compressed models of every kind that a checkpoint can hold, and what a checkpoint must load as."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_compress as hfc
from hf_compress.checkpoint.bits import settle_bits
from hf_compress.engines.ops import pack_gptq
from hf_compress.layers.packed_blocks import PackedBlocksLinear, packed_blocks
from hf_compress.layers.packed_linear import PackedLinear

LAYER = "bert.encoder.layer.0"
TOKENS = torch.arange(12).reshape(2, 6)


def bert(**changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                 max_position_embeddings=32)  # fmt: skip
    return BertForSequenceClassification(BertConfig(**sizes, **changes)).eval()


def stored_as(model: PreTrainedModel, name: str, **changes) -> PreTrainedModel:
    """Changes `model`: the integers of a packed layer under another scheme; with desc_act columns turn round."""
    old = model.get_submodule(name)
    new = PackedLinear.like(old, dataclasses.replace(old.scheme, **changes))
    new.qweight, new.scales, new.qzeros = old.qweight, old.scales, old.qzeros
    if new.scheme.desc_act:
        new.g_idx = torch.arange(new.in_features, dtype=torch.int32).flip(0) // (new.in_features // len(new.scales))
    model.set_submodule(name, new)
    settle_bits(model)
    return model


def packed():
    """2, 3, 4 and 8 bit, act-order, calibrated inputs and an embedding."""
    bits = {f"{LAYER}.attention.self.query": 2, f"{LAYER}.attention.self.key": 3, f"{LAYER}.attention.self.value": 4,
            f"{LAYER}.output.dense": 8, "bert.embeddings.word_embeddings": 4}  # fmt: skip
    model = hfc.quantize(bert(), bits, group_size=16)
    stored_as(model, f"{LAYER}.attention.self.query", desc_act=True)
    return stored_as(model, f"{LAYER}.output.dense", activation_bits=8, activation_range=(-2.0, 3.0))


def cut():
    """Structure: heads and neurons gone, a table in two factors, blocks."""
    model = hfc.prune_neurons(hfc.prune_heads(bert(), {0: [1, 2]}), {0: range(32)})
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:16, :16] = 0
        layer.attention.self.query.weight[:, 16:] = 0
    return hfc.to_block_sparse(hfc.factorise_embeddings(model, 8), 16)


def blocks():
    model = bert()
    with torch.no_grad():
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        weight[:16, :16] = weight[16:, 16:] = 0
    return hfc.to_block_sparse(model, 16)


def modernbert():
    torch.manual_seed(0)
    config = ModernBertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                              vocab_size=64, max_position_embeddings=64, pad_token_id=0, cls_token_id=1, sep_token_id=2,
                              local_attention=8, global_attn_every_n_layers=2)  # fmt: skip
    return ModernBertForSequenceClassification(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=32, vocab_size=64)).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=64, intermediate_size=64, max_position_embeddings=32,
                         tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5(num_layers: int = 1):
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=num_layers, num_heads=4, vocab_size=64,
                      decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def layers():
    """Layers of a deeper model."""
    return hfc.prune_layers(modernbert(), keep=[1, 2])


CHECKPOINTS: dict[str, Callable[[], PreTrainedModel]] = {
    "packed": packed,
    "codebook": lambda: hfc.quantize(bert(), 3, grid="kmeans", group_size=-1),
    "cut": cut,
    "layers": layers,
    "heads": lambda: hfc.prune_heads(bert(), {0: [3]}),
    "low rank": lambda: hfc.factorise_embeddings(bert(), 8),
    "blocks": blocks,
    "layers and bits": lambda: hfc.quantize(layers(), 8, group_size=-1, symmetric=True),
    "gpt2": lambda: hfc.quantize(gpt2(), 4, group_size=16),
    "llama": lambda: hfc.quantize(llama(), 4, group_size=32, embedding_bits=8),
    "heads and bits": lambda: hfc.quantize(hfc.prune_heads(bert(), {0: [0]}), 4, group_size=8, symmetric=True),
    "t5": lambda: hfc.quantize(t5(), 8, group_size=-1),
    "one bit": lambda: hfc.quantize(bert(), 1, grid="binary", group_size=16),
    "ternary": lambda: hfc.quantize(gpt2(), 2, grid="ternary", group_size=-1, scale_dtype="float32"),
    "parts": lambda: hfc.quantize(bert(), 3, embedding_bits=2, embedding_parts=4, embedding_stages=2),
    "tied parts": lambda: hfc.quantize(llama(), 4, embedding_bits=3, embedding_parts=1, embedding_stages=3),
    "factors": lambda: hfc.factorise(modernbert(), rank=6),
    "shared factors": lambda: hfc.factorise(llama(), rank=4, shared=True),
    "layers and factors": lambda: hfc.prune_layers(hfc.factorise(modernbert(), rank=6), keep=[1, 2]),
    "packed blocks": lambda: hfc.quantize(blocks(), 4, group_size=16),
    "deeper decoder": lambda: hfc.quantize(hfc.prune_layers(t5(2), keep=[1, 2, 3]), 8, group_size=-1),
}  # fmt: skip


def words(packed: Tensor, bits: int, number: int) -> Tensor:
    """Integers of a row of 32-bit words, lowest bits first: (N, W) -> (N, number)."""
    stream = [(packed.long() >> shift) & 1 for shift in range(32)]
    stream = torch.stack(stream, -1).flatten(1)[:, : number * bits].unflatten(1, (number, bits))
    return (stream << torch.arange(bits)).sum(-1)


class Checkpoint:
    """An undamaged checkpoint in memory: the model that was saved, and what became of it on the disk."""

    def __init__(self, name: str, folder: Path):
        self.name, self.model = name, CHECKPOINTS[name]()
        self.model.save_pretrained(folder)
        self._keep(folder)

    def _keep(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert self.config.get("quantization_config"), f"{self.name} is no compressed checkpoint"
        self.weights = (folder / "model.safetensors").read_bytes()
        self.tensors = load_file(folder / "model.safetensors")
        loaded = self.load(folder)
        self.compare(loaded, folder)
        self.attributes = attributes(loaded)

    def load(self, folder: Path) -> PreTrainedModel:
        return type(self.model).from_pretrained(folder)

    def stored(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a folder that loaded. AssertionError unless they are the undamaged ones, but for values."""
        stored, prefix = load_file(folder / "model.safetensors"), f"{self.model.base_model_prefix}."
        lost = {name for name in self.tensors.keys() - stored.keys() if name.removeprefix(prefix) in stored}
        stored |= {name: stored.pop(name.removeprefix(prefix)) for name in lost}  # which Transformers reads alike
        nothing = {n: t for n, t in self.tensors.items() if n.endswith(".weight") and t.numel() <= 1}
        stored |= {n: t for n, t in nothing.items() if n not in stored}  # is for others, who would not load it
        kinds = [{n: (t.dtype, t.shape) for n, t in one.items()} for one in (self.tensors, stored)]
        other = sorted(name for name in {*kinds[0], *kinds[1]} if kinds[0].get(name) != kinds[1].get(name))
        assert not other, f"{other[:3]} are others than were saved, and it loads all the same"
        return stored

    def expected(self, folder: Path) -> PreTrainedModel:
        """The model that was saved, with the values that the file holds now; no reader of checkpoints is asked."""
        stored, model = self.stored(folder), copy.deepcopy(self.model)
        for name, tensor in model.state_dict().items():
            key = name if name in stored else name.removeprefix(f"{model.base_model_prefix}.")
            if key in stored and tensor.shape == stored[key].shape:  # a sentinel has none of its own
                tensor.copy_(stored[key])
        for name, module in packed_blocks(model).items():
            parts = {part: stored[f"{name}.{part}"] for part in ("qblocks", "crow_indices", "col_indices")}
            place_blocks(module, *parts.values())
        for module in model.modules():
            for renew in ("prepare", "build_index"):
                if callable(getattr(module, renew, None)):
                    getattr(module, renew)()
        return model

    def compare(self, model: PreTrainedModel, folder: Path) -> None:
        """Raise AssertionError for a tensor, a way of storing or an output that is not that of the expected model."""
        expected = self.expected(folder)
        (mine, theirs) = (one.state_dict() for one in (expected, model))
        assert mine.keys() == theirs.keys(), f"other tensors: {sorted(mine.keys() ^ theirs.keys())[:3]}"
        for name, tensor in mine.items():
            is_same = tensor.shape == theirs[name].shape and bool((tensor == theirs[name]).all())
            assert is_same, f"{name} is not what was saved"
        assert schemes(model) == schemes(expected), "weights are said to be stored otherwise than they were saved"
        close(model, expected)


def place_blocks(layer: PackedBlocksLinear, qblocks: Tensor, crow: Tensor, col: Tensor) -> None:
    """Changes `layer`: its integers are zero points, but where a block of `qblocks` lies."""
    _, zero_points, groups = layer.integers()
    q, side, bits = zero_points[groups].t().clone(), layer.block_size, layer.scheme.bits
    found = words(qblocks[None], bits, len(col) * side**2).view(-1, side, side)
    for row in range(len(crow) - 1):
        for i in range(int(crow[row]), int(crow[row + 1])):
            rows, columns = (slice(n * side, (n + 1) * side) for n in (row, int(col[i])))
            q[rows, columns] = found[i].to(q.dtype)
    layer.qweight = pack_gptq(q.to(torch.uint8), bits)


def close(model: PreTrainedModel, expected: nn.Module) -> None:
    """Raise AssertionError for other outputs, beyond the rounding of a sum in another order."""
    found, wanted = (outputs(one) for one in (model, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **more).logits


def schemes(model: nn.Module) -> dict[str, object]:
    return {name: module.scheme for name, module in model.named_modules() if hasattr(module, "scheme")}


def attributes(model: nn.Module) -> set[tuple[str, str]]:
    return {(type(module).__name__, name) for module in model.modules() for name in vars(module)}
