"""Cuts what is worth least for its cost: until a text takes so many milliseconds, or the weights so many megabytes.

Times are measured in that runtime (`hf_compress.shrinking.times`), where a layer may cost next to nothing or most of
it: Kurtic et al., 2023, https://arxiv.org/abs/2302.04089 chose structures so for one engine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.counting import num_parameters
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.budget import check_num_layers, choose, cut
from hf_compress.pruning.masks import check_prunable
from hf_compress.pruning.units import Unit, units

NANOSECONDS = 10**6  # of a millisecond: costs are whole numbers


@dataclass(frozen=True)
class StructureTimes:
    """Milliseconds of one text: what does not depend on the layers, and for each whole layer its heads, its neurons
    and the rest."""

    fixed: float
    heads: float
    neurons: float
    rest: float

    @property
    def layer(self) -> float:
        return self.heads + self.neurons + self.rest

    def of(self, layers: int, *, heads: float = 1.0, neurons: float = 1.0) -> float:
        """Of a model of so many layers, each with these shares of its heads and neurons."""
        return self.fixed + layers * (self.rest + heads * self.heads + neurons * self.neurons)


def prune_to_time(
    model: PreTrainedModel, dataloader: Iterable[Mapping[str, Tensor]], times: StructureTimes, milliseconds: float,
    num_layers: int | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Cut heads, neurons and layers of a whole `model`, in order of importance over time, until a text takes no more.

    Changes `model` and returns it. `dataloader` and `num_layers` as in `hfc.prune`. Raises ValueError, and
    changes nothing, for a time that cannot be had.
    """
    check_prunable(model, "prune_to_time")
    check_num_layers(model, num_layers)
    parts = anatomy(model)
    surplus = times.of(len(parts.layers)) - milliseconds
    if surplus <= 0 and num_layers is None:
        return model
    heads = [sum(attention.num_heads for attention in layer.attentions) for layer in parts.layers]

    def timed(unit: Unit) -> Unit:
        layer = parts.layers[unit.layer]
        time = times.layer
        if not unit.is_layer:
            time = times.heads * len(unit.heads) / heads[unit.layer]
            time += times.neurons * len(unit.neurons) / layer.feed_forward.num_neurons
        return replace(unit, cost=round(NANOSECONDS * time))

    pieces = [timed(unit) for unit in units(model, dataloader, None, layers=num_layers is None)]
    pieces = sorted((unit for unit in pieces if unit.cost > 0), key=lambda unit: unit.importance / unit.cost)
    return cut(model, choose(parts, pieces, round(NANOSECONDS * surplus), num_layers))


def prune_to_size(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Tensor]],
    megabytes: float,
    *,
    bits: int = 8,
    embedding_bits: int = 8,
    num_layers: int | None = None,
) -> PreTrainedModel:
    """Cut heads, neurons and layers, in order of importance over parameters, until the model will be that small.

    Changes `model` and returns it. `dataloader` and `num_layers` as in `hfc.prune`; tables will be stored in
    `embedding_bits`, all else in `bits`. Raises ValueError, and changes nothing, for a size that cannot be had.
    """
    check_prunable(model, "prune_to_size")
    check_num_layers(model, num_layers)
    surplus = stored_megabytes(model, bits, embedding_bits) - megabytes
    if surplus <= 0 and num_layers is None:
        return model
    found = units(model, dataloader, None, layers=num_layers is None)
    pieces = sorted(found, key=lambda unit: unit.importance / max(unit.cost, 1))
    return cut(model, choose(anatomy(model), pieces, int(surplus * 8e6 / bits), num_layers))


def stored_megabytes(model: PreTrainedModel, bits: int, embedding_bits: int) -> float:
    """Of the weights in so many bits; scales and norms, a hundredth of them, are not told apart."""
    tables = model.get_input_embeddings().weight.numel()
    return (tables * embedding_bits + (num_parameters(model) - tables) * bits) / 8e6
