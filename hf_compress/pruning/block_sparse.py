"""From zeros to something smaller: empty heads and neurons are cut, the rest stores only blocks that are not empty."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.sparsity import settle_sparsity
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.model.anatomy import Anatomy, anatomy, module_names
from hf_compress.model.record import read_part
from hf_compress.pruning.importance.neurons import dense_weight
from hf_compress.pruning.silent import silent_heads, silent_neurons
from hf_compress.surgery.heads import prune_heads
from hf_compress.surgery.neurons import prune_neurons

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


def to_block_sparse(model: PreTrainedModel, block_size: int = 32) -> PreTrainedModel:
    """Stop storing blocks of zeros. Changes `model`, whose weights were block-pruned before, and returns it.

    Heads and neurons that add nothing are cut first, as long as whole blocks of them go: the layers left are smaller,
    dense or not. Then each linear map of a layer with an empty block of `block_size` x `block_size`
    becomes a `BlockSparseLinear`. Outputs stay the same but for the order of sums. Blocks of 4 and 8 are stored inside
    blocks of 16. The result trains, is saved and loads with `from_pretrained`.

    Raises ValueError, and changes nothing, for another block size or a model that is quantized.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}.")
    if read_part(model.config, "bits") or read_part(model.config, "sparsity"):
        raise ValueError(
            "This model is quantized or block-sparse already. Make it block-sparse once, before quantizing."
        )
    with torch.no_grad():
        parts = anatomy(model)
        heads, neurons = _empty_heads(parts, block_size), _empty_neurons(parts, block_size)
    prune_heads(model, heads)
    prune_neurons(model, neurons)
    names = module_names(model)
    replacements = {}
    for module in _projections(anatomy(model)):
        mask = stored_blocks(dense_weight(module), block_size)
        if not mask.all():
            replacements[names[module]] = BlockSparseLinear.from_dense(module, mask, (block_size, block_size))
    for name, module in replacements.items():
        model.set_submodule(name, module)
    settle_sparsity(model)
    return model


def stored_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(ceil(N / side), ceil(K / side)) True where a block of `weight` (N, K) is not all zero."""
    N, K = weight.shape
    padded = F.pad(weight != 0, (0, -K % block_size, 0, -N % block_size))
    return padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size)).any(dim=(1, 3))


def _projections(parts: Anatomy) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for layer in parts.layers:
        for attention in layer.attentions:
            own = (attention.query, attention.key, attention.value, *attention.positional, attention.output)
            found.update(dict.fromkeys(own))
        found.update(dict.fromkeys((*layer.feed_forward.inputs, layer.feed_forward.output)))
    return [module for module in found if type(module) in (nn.Linear, Conv1D) and module.weight.numel()]


def _empty_heads(parts: Anatomy, block_size: int) -> dict[int, list[int]]:
    """Heads that add nothing, where a head is made of whole blocks, so that none is torn; a stack keeps some."""
    found: dict[int, list[int]] = {}
    for stack in parts.stacks:
        for place in range(max(len(layer.attentions) for layer in stack.layers)):
            attentions = [layer.attentions[place] for layer in stack.layers]
            silent = [[] if a.head_dim % block_size else silent_heads(a) for a in attentions]
            if any(len(gone) < a.num_heads for gone, a in zip(silent, attentions, strict=True)):
                numbers = [parts.attentions.index(a) for a in attentions]
                found.update({number: gone for number, gone in zip(numbers, silent, strict=True) if gone})
    return found


def _empty_neurons(parts: Anatomy, block_size: int) -> dict[int, list[int]]:
    """Neurons that add nothing, in whole blocks, so that the blocks of the others stay where they are."""
    found = {}
    for number, layer in enumerate(parts.layers):
        num_neurons = layer.feed_forward.num_neurons
        silent = set(silent_neurons(layer.feed_forward)) if num_neurons % block_size == 0 else set()
        blocks = [range(first, first + block_size) for first in range(0, num_neurons, block_size)]
        found[number] = [neuron for block in blocks if silent.issuperset(block) for neuron in block]
    everything = all(len(found[i]) == layer.feed_forward.num_neurons for i, layer in enumerate(parts.layers))
    return {} if everything else {number: gone for number, gone in found.items() if gone}
