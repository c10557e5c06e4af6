"""What a GGUF file holds of a model, under llama.cpp's names."""

import logging
from collections.abc import Iterator

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.formats.named_weight import NamedWeight, named_weights
from hf_compress.formats.runtimes.gguf_blocks import Matrix, block_matrix, dense_matrix
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.low_rank import LowRank
from hf_compress.layers.packed_blocks import PackedBlocksLinear
from hf_compress.layers.packed_embedding import TiedHead

logger = logging.getLogger(__name__)


def renamed(
    model: PreTrainedModel, arch: str, layers: int, *, without: str | None = None
) -> Iterator[tuple[str, str, Tensor | NamedWeight]]:
    """Transformers' name, llama.cpp's name and content of each tensor; the module `without` is left out.

    Raises ValueError where there is no name.
    """
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, layers)
    for name, content in stored_tensors(model):
        if without is not None and name.startswith(f"{without}."):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{name} has no name in llama.cpp's architecture {arch!r}. Export as 'plain'.")
        yield name, target, content


def as_matrix(model: PreTrainedModel, content: Tensor | NamedWeight, *, fill: bool) -> Matrix:
    """In ggml's types; `fill` allows columns of zeros up to whole blocks. Raises ValueError where it is not exact."""
    if not isinstance(content, NamedWeight):
        return dense_matrix(content)
    matrix = block_matrix(content, fill=fill)
    expected = model.get_submodule(content.name).dequantize(torch.float32).cpu().numpy()
    if not np.array_equal(matrix.decoded()[:, : expected.shape[1]], expected):
        raise ValueError(f"{content.name}: its blocks do not decode to its weight. Export as 'plain'.")
    return matrix


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor | NamedWeight]]:
    """What there is to write, under Transformers' names; a head that shares the table is not written."""
    packed = {weight.name: weight for weight in named_weights(model, act_order=False)}
    tied = tied_head(model)
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            raise ValueError(
                f"{name} is a product of two factors, which llama.cpp has no place for. Export as 'plain'."
            )
        if isinstance(module, (BlockSparseLinear, PackedBlocksLinear)):
            logger.warning("gguf has no block-sparse product: %s leaves with its zeros.", name)
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
    if head is None:
        return None
    weight = head._parameters.get("weight")
    is_tied = isinstance(head, TiedHead) or (weight is not None and weight is table._parameters.get("weight"))
    return head if is_tied else None
