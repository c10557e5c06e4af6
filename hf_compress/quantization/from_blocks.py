"""Block-sparse maps on their way to few bits: dense while they are rounded, packed in blocks afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.sparsity import block_sparse_modules, settle_sparsity
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.packed_linear import PackedLinear, unpacked_linear
from hf_compress.model.record import read_part
from hf_compress.surgery.settle import build_twin
from hf_compress.training.stored import in_blocks


@contextmanager
def dense_blocks(model: PreTrainedModel) -> Iterator[Mapping[str, BlockSparseLinear]]:
    """While open, the block-sparse maps of `model` are ordinary ones; yields them by name.

    What is packed by then stays packed, saved in blocks of the same size; the others are what they were.
    """
    found = dict(block_sparse_modules(model))
    twin = build_twin(model, model.config, read_part(model.config, "structure")) if found else None
    for name, module in found.items():
        is_conv1d = isinstance(twin.get_submodule(name), Conv1D)
        model.set_submodule(name, unpacked_linear(module, module.dense_weight().detach(), is_conv1d=is_conv1d))
    try:
        yield found
    finally:
        for name, module in found.items():
            model.set_submodule(name, _again_in_blocks(model.get_submodule(name), module, name))
        if found:
            settle_sparsity(model)


def _again_in_blocks(module: nn.Module, before: BlockSparseLinear, name: str) -> nn.Module:
    return in_blocks(module, before.block_size[0], name) if isinstance(module, PackedLinear) else before
