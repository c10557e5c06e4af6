"""BERT encoders of sentence embeddings in a GGUF file; cut heads and neurons are filled up with zeros."""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
from gguf import TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.formats.runtimes.folder import check_pair
from hf_compress.formats.runtimes.gguf_blocks import BLOCK, Matrix
from hf_compress.formats.runtimes.gguf_tensors import as_matrix, renamed
from hf_compress.model.anatomy import anatomy
from hf_compress.model.pooling import pooling_of

POOLINGS = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "lasttoken": gguf.PoolingType.LAST}


@dataclass(frozen=True)
class Shape:
    """One number for all layers, as llama.cpp's `bert` has it."""

    layers: int
    heads: int
    neurons: int
    arch: str = "bert"


def shape_of(model: PreTrainedModel) -> Shape:
    """Raises ValueError for heads and settings that llama.cpp's `bert` does not compute."""
    config = model.config
    if type(model).__name__ != "BertModel":
        raise ValueError(
            f"llama.cpp's bert gives embeddings, so format='gguf' takes a BertModel, not {type(model).__name__}."
        )
    if (mode := pooling_of(model).mode) not in POOLINGS:
        raise ValueError(f"llama.cpp pools by {', '.join(POOLINGS)}, not {mode}.")
    if config.hidden_act != "gelu" or config.is_decoder:
        raise ValueError(f"llama.cpp's bert is an encoder with GELU; this one has {config.hidden_act!r}.")
    layers, head_dim = anatomy(model).layers, config.hidden_size // config.num_attention_heads
    for layer in layers:
        if layer.attention.num_heads and layer.attention.head_dim != head_dim:
            raise ValueError(f"{layer.name}: llama.cpp's bert has heads of {head_dim}, not {layer.attention.head_dim}.")
    neurons = max(-(-layer.feed_forward.num_neurons // BLOCK) for layer in layers) * BLOCK
    return Shape(len(layers), config.num_attention_heads, max(neurons, BLOCK))


def add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel, shape: Shape) -> None:
    writer.add_feed_forward_length(shape.neurons)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_eps(model.config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(POOLINGS[pooling_of(model).mode])


def named_matrices(model: PreTrainedModel, shape: Shape) -> Iterator[tuple[str, Matrix]]:
    """llama.cpp's name and content of each tensor; the pooler is none of an embedding."""
    for name, target, content in renamed(model, shape.arch, shape.layers, without="pooler"):
        reads_neurons = bool(re.search(r"\.\d+\.output\.dense\.weight", name))
        reads_heads = name.endswith(".attention.output.dense.weight")
        matrix = as_matrix(model, content, fill=reads_neurons or reads_heads)
        if ".attention.self." in name:
            matrix = matrix.with_rows(model.config.hidden_size)
        elif ".intermediate." in name:
            matrix = matrix.with_rows(shape.neurons)
        elif reads_neurons or reads_heads:
            matrix = matrix.with_columns(shape.neurons if reads_neurons else model.config.hidden_size)
        # added to the tokens as it is stored, and ggml adds float32 alone: other types end its process
        yield target, matrix.unpacked() if target == "token_types.weight" else matrix


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises ValueError unless it splits words into pieces as llama.cpp does, in lower case."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    parts = {part: (state.get(part) or {}).get("type") for part in ("model", "normalizer", "pre_tokenizer")}
    expected = {"model": "WordPiece", "normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    if parts != expected or not state["normalizer"]["lowercase"]:
        raise ValueError(f"llama.cpp's bert has {expected} in lower case; this tokenizer has {parts}.")
    check_pair(tokenizer, model.config.vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Pieces as llama.cpp spells them: a word begins with U+2581, what goes on has no ##."""
    names, added = {i: token for token, i in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder

    def spelled(i: int) -> str:
        name = names.get(i, f"[PAD{i}]")
        return name if i in added or i not in names else name[2:] if name.startswith("##") else f"\u2581{name}"

    vocabulary = range(model.config.vocab_size)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(model.config.type_vocab_size)
    writer.add_token_list([spelled(i) for i in vocabulary])
    kinds = [TokenType.UNUSED if i not in names else TokenType.CONTROL if i in added else TokenType.NORMAL
             for i in vocabulary]  # fmt: skip
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:  # gguf reads special tokens from files
        tokenizer.save_pretrained(folder)
        gguf.SpecialVocab(folder, n_vocab=len(vocabulary)).add_to_gguf(writer, quiet=True)
