"""Llama, Mistral and Qwen2 in a GGUF file: llama.cpp's names, its order of rows, widths that its blocks fill."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import torch
from transformers import PreTrainedModel

from hf_compress.formats.runtimes.gguf_blocks import BLOCK, Matrix, dense_matrix
from hf_compress.formats.runtimes.gguf_tensors import as_matrix, renamed
from hf_compress.formats.runtimes.gguf_tokenizer import add_tokenizer, check_tokenizer
from hf_compress.model.anatomy import anatomy

__all__ = ["add_shape", "add_tokenizer", "check_tokenizer", "named_matrices", "shape_of"]
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


def add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel, shape: Shape) -> None:
    config = model.config
    for add, numbers in (
        (writer.add_feed_forward_length, shape.neurons),
        (writer.add_head_count, shape.heads),
        (writer.add_head_count_kv, shape.key_value_heads),
    ):
        add(numbers if shape.is_uneven else numbers[0])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def named_matrices(model: PreTrainedModel, shape: Shape) -> Iterator[tuple[str, Matrix]]:
    """llama.cpp's name and content of each tensor."""
    for name, target, content in renamed(model, shape.arch, len(shape.heads)):
        leaf, layer = name.split(".")[-2], re.search(r"\.layers\.(\d+)\.", name)
        matrix = as_matrix(model, content, fill=leaf == "down_proj")
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
