"""How each weight of a finished model is stored: packed, in blocks, or as it is."""

import logging
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.bits import settle_bits
from hf_compress.checkpoint.sparsity import settle_sparsity
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.model.anatomy import Anatomy, anatomy, matrix
from hf_compress.training.pieces import Form

logger = logging.getLogger(__name__)

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


def store(model: PreTrainedModel, forms: Mapping[nn.Module, Form], *, block_size: int | None = None) -> None:
    """Changes `model`: each weight gets its last form, and config and record say which.

    Modules of `forms` become what these make of them. Other linear maps of the layers that have an empty block of
    `block_size` x `block_size` become block-sparse. A weight that lost all its rows or columns stays as it is.
    """
    names = {module: name for name, module in model.named_modules()}
    packed = {names[m]: form.stored(m) for m, form in forms.items() if m in names and m.weight.numel()}
    blocks, zeros = {}, []
    for module in projections(anatomy(model)) if block_size in BLOCK_SIZES else ():
        mask = stored_blocks(matrix(module).detach(), block_size)
        if names[module] in packed:
            zeros.append(float((~mask).float().mean()))
        elif not mask.all():
            blocks[names[module]] = BlockSparseLinear.from_dense(module, mask, (block_size, block_size))
    for name, module in {**packed, **blocks}.items():
        model.set_submodule(name, module)
    if any(zeros):
        logger.warning(
            "%d of the packed weights have empty blocks (%.0f%% of the blocks of all): they are stored dense in few "
            "bits, their zeros with them.", sum(map(bool, zeros)), 100 * sum(zeros) / len(zeros),
        )  # fmt: skip
    if blocks:
        settle_sparsity(model)
    if packed:
        settle_bits(model)


def stored_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(ceil(N / side), ceil(K / side)) True where a block of `weight` (N, K) is not all zero."""
    N, K = weight.shape
    padded = F.pad(weight != 0, (0, -K % block_size, 0, -N % block_size))
    return padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size)).any(dim=(1, 3))


def projections(parts: Anatomy) -> list[nn.Module]:
    """The linear maps of attentions and feed-forwards that still have a weight."""
    found: dict[nn.Module, None] = {}
    for layer in parts.layers:
        for attention in layer.attentions:
            own = (attention.query, attention.key, attention.value, *attention.positional, attention.output)
            found.update(dict.fromkeys(own))
        found.update(dict.fromkeys((*layer.feed_forward.inputs, layer.feed_forward.output)))
    return [module for module in found if type(module) in (nn.Linear, Conv1D) and module.weight.numel()]
