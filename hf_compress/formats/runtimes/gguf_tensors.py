"""The tensors of a GGUF file: llama.cpp's names, its order of rows, and widths that its blocks fill."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.formats.packed_weight import PackedWeight, packed_weights
from hf_compress.formats.runtimes.gguf_blocks import BLOCK, Matrix, block_matrix, dense_matrix
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.low_rank import LowRank
from hf_compress.layers.packed_embedding import TiedHead
from hf_compress.model.anatomy import anatomy

FAMILIES = ("llama", "mistral", "qwen2")
ROTARY = ("default", "linear", "llama3")  # fixed factors of the frequencies


@dataclass(frozen=True)
class Shape:
    """What llama.cpp has to know of the layers, one number for each."""

    arch: str
    heads: list[int]
    key_value_heads: list[int]
    neurons: list[int]  # filled up with zeros
    head_dim: int

    @property
    def is_uneven(self) -> bool:
        return self.arch == "deci"


def shape_of(model: PreTrainedModel) -> Shape:
    """Raises ValueError for families and settings that llama.cpp's Llama does not compute."""
    config = model.config
    family = config.model_type
    if family not in FAMILIES or not model.can_generate():
        raise ValueError(f"format='gguf' knows language models of {FAMILIES}, not {type(model).__name__}.")
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", family == "mistral")
    if config.hidden_act != "silu" or sliding:
        raise ValueError(f"llama.cpp's Llama has SiLU and no sliding window; this {family} has {config.hidden_act!r}.")
    rotary = model.base_model.rotary_emb
    if rotary.rope_type not in ROTARY or rotary.attention_scaling != 1:
        raise ValueError(f"Positions of the kind {rotary.rope_type!r} are not written; known are {ROTARY}.")
    layers = anatomy(model).layers
    packed = {name for name, module in model.named_modules() if hasattr(module, "scheme")}
    unit = BLOCK if packed else 1
    # A layer without heads or neurons gets some of zeros: `deci` asks layer 0 for heads, and where it finds no neurons
    # it skips the attention too.
    heads = [max(layer.attention.num_heads, 1) for layer in layers]
    key_value_heads = [max(layer.attention.num_key_value_heads, 1) for layer in layers]
    neurons = [max(-(-layer.feed_forward.num_neurons // unit) * unit, BLOCK) for layer in layers]
    head_dim = layers[0].attention.head_dim
    is_uneven = any(len(set(numbers)) > 1 for numbers in (heads, key_value_heads, neurons))
    is_whole_qwen2 = family == "qwen2" and heads[0] * head_dim == config.hidden_size
    arch = "deci" if is_uneven else "qwen2" if is_whole_qwen2 else "llama"  # these two take Qwen2's biases as well
    return Shape(arch, heads, key_value_heads, neurons, head_dim)


def named_matrices(model: PreTrainedModel, shape: Shape) -> Iterator[tuple[str, Matrix]]:
    """llama.cpp's name and content of each tensor."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == shape.arch)
    names = gguf.get_tensor_name_map(arch, len(shape.heads))
    for name, content in stored_tensors(model):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{name} has no name in llama.cpp's architecture {shape.arch!r}. Export as 'plain'.")
        leaf, layer = name.split(".")[-2], re.search(r"\.layers\.(\d+)\.", name)
        widens = leaf == "down_proj"
        if isinstance(content, PackedWeight):
            matrix = block_matrix(content, fill=widens)
            expected = model.get_submodule(content.name).dequantize(torch.float32).cpu().numpy()
            if not np.array_equal(matrix.decoded()[:, : expected.shape[1]], expected):
                raise ValueError(f"{content.name}: its blocks do not decode to its weight. Export as 'plain'.")
        else:
            matrix = dense_matrix(content)
        if leaf.endswith("_proj"):
            matrix = fitted(matrix, leaf, shape, int(layer[1]))
        yield target, matrix
    rotary = model.base_model.rotary_emb
    if rotary.rope_type != "default":
        dims = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        factors = model.config.rope_parameters["rope_theta"] ** -dims / rotary.inv_freq.float().cpu()
        yield "rope_freqs.weight", dense_matrix(factors)


def fitted(matrix: Matrix, leaf: str, shape: Shape, layer: int) -> Matrix:
    """A projection with the rows and columns that the file says, in llama.cpp's order."""
    heads, kv_heads = shape.heads[layer], shape.key_value_heads[layer]
    numbers = {"q_proj": heads, "o_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    size = numbers[leaf] * shape.head_dim if leaf in numbers else shape.neurons[layer]
    if leaf not in ("o_proj", "down_proj"):
        matrix = matrix.with_rows(size)
    elif matrix.values.ndim == 2:
        matrix = matrix.with_columns(size)
    is_rotated = leaf in ("q_proj", "k_proj") and shape.arch != "qwen2"
    return matrix.permuted(numbers[leaf]) if is_rotated else matrix


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """What there is to write, under Transformers' names; a head that shares the table is not written."""
    packed = {weight.name: weight for weight in packed_weights(model, act_order=False)}
    tied = tied_head(model)
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            raise ValueError(
                f"{name} is a product of two factors, which llama.cpp has no place for. Export as 'plain'."
            )
        if name in packed:
            yield f"{name}.weight", packed[name]
        elif isinstance(module, BlockSparseLinear):
            yield f"{name}.weight", module.dense_weight()
        for leaf, parameter in module.named_parameters(recurse=False):
            is_left = isinstance(module, BlockSparseLinear) and leaf == "values"
            if not is_left and not (module is tied and leaf == "weight"):
                yield f"{name}.{leaf}", parameter


def tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head, where it shares the table of the input embeddings."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    weight = head._parameters.get("weight")
    is_tied = isinstance(head, TiedHead) or (weight is not None and weight is table._parameters.get("weight"))
    return head if is_tied else None
