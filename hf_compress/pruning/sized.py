"""Cuts what is worth least for its bytes, until the weights take so many megabytes in few bits."""

from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.counting import num_parameters
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.budget import choose, cut
from hf_compress.pruning.masks import check_prunable
from hf_compress.pruning.units import units


def prune_to_size(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Tensor]],
    megabytes: float,
    *,
    bits: int = 8,
    embedding_bits: int = 8,
) -> PreTrainedModel:
    """Cut heads, neurons and layers, in order of importance over parameters, until the model will be that small.

    Changes `model` and returns it. `dataloader` as in `hfc.prune`; tables will be stored in `embedding_bits`, all else
    in `bits`. Raises ValueError, and changes nothing, for a size that cannot be had.
    """
    check_prunable(model, "prune_to_size")
    surplus = stored_megabytes(model, bits, embedding_bits) - megabytes
    if surplus <= 0:
        return model
    pieces = sorted(units(model, dataloader, None), key=lambda unit: unit.importance / max(unit.cost, 1))
    return cut(model, choose(anatomy(model), pieces, int(surplus * 8e6 / bits)))


def stored_megabytes(model: PreTrainedModel, bits: int, embedding_bits: int) -> float:
    """Of the weights in so many bits; scales and norms, a hundredth of them, are not told apart."""
    tables = model.get_input_embeddings().weight.numel()
    return (tables * embedding_bits + (num_parameters(model) - tables) * bits) / 8e6
