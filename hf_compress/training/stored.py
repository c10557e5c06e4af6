"""How each weight of a finished model is stored: packed, in blocks, or as it is."""

import logging
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.bits import settle_bits
from hf_compress.checkpoint.sparsity import settle_sparsity
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.packed_blocks import PackedBlocksLinear, stored_blocks
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.model.anatomy import Anatomy, anatomy, is_plain, matrix
from hf_compress.training.pieces import Form

logger = logging.getLogger(__name__)

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


def store(model: PreTrainedModel, forms: Mapping[nn.Module, Form], *, block_size: int | None = None) -> None:
    """Changes `model`: each weight gets its last form, and config and record say which.

    Modules of `forms` become what these make of them, and of packed ones only the blocks of `block_size` x `block_size`
    that are not empty are saved, where that is smaller. Other linear maps of the layers that have an empty block become
    block-sparse. A weight that lost all its rows or columns stays as it is.
    """
    names = {module: name for name, module in model.named_modules()}
    packed = {names[m]: form.stored(m) for m, form in forms.items() if m in names and m.weight.numel()}
    blocks = {}
    for module in projections(anatomy(model)) if block_size in BLOCK_SIZES else ():
        name, mask = names[module], stored_blocks(matrix(module).detach(), block_size)
        if name in packed:
            blocks[name] = in_blocks(packed[name], block_size, name)
        elif not mask.all():
            blocks[name] = BlockSparseLinear.from_dense(module, mask, (block_size, block_size))
    for name, module in {**packed, **blocks}.items():
        model.set_submodule(name, module)
    if blocks:
        settle_sparsity(model)
    if packed:
        settle_bits(model)


def in_blocks(layer: PackedLinear, block_size: int, name: str) -> PackedLinear:
    """`layer`, saved in blocks where that is smaller; a codebook, whose zeros are indices like others, is whole."""
    found = PackedBlocksLinear.of(layer, block_size) if isinstance(layer, PackedLinear) else None
    if found is None:
        logger.info("%s has too few empty blocks to be saved without them: it is packed whole.", name)
    return found or layer


def projections(parts: Anatomy) -> list[nn.Module]:
    """The linear maps of attentions and feed-forwards that still have a weight."""
    found: dict[nn.Module, None] = {}
    for layer in parts.layers:
        for attention in layer.attentions:
            own = (attention.query, attention.key, attention.value, *attention.positional, attention.output)
            found.update(dict.fromkeys(own))
        found.update(dict.fromkeys((*layer.feed_forward.inputs, layer.feed_forward.output)))
    return [module for module in found if is_plain(module) and module.weight.numel()]
