"""Feed-forward neurons, cut out for good: rows of the input projections, columns of the output projection."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from hf_compress.model.anatomy import Layer, is_projection, out_features
from hf_compress.model.classes import ModuleT
from hf_compress.model.cuttable import cuttable
from hf_compress.model.unfinished import check_finished
from hf_compress.surgery.transaction import Transaction


def prune_neurons(model: ModuleT, neurons: Mapping[int, Iterable[int]]) -> ModuleT:
    """Remove feed-forward neurons. Changes `model` and its config, and returns it.

    `neurons` maps a layer, its place in `anatomy(model).layers` (ALBERT has one for all), to the neurons that go, both
    counted from 0. Any number may go, differently in each layer, all of them too. A gated feed-forward loses gate and
    value together.
    Raises ValueError, and changes nothing, for layers and neurons that do not exist, or if none would be left at all.
    """
    check_finished(model, "prune_neurons")
    layers = cuttable(model).layers
    keep = {number: _kept_neurons(layers, number, gone) for number, gone in neurons.items()}
    left = [len(keep.get(i, range(layer.feed_forward.num_neurons))) for i, layer in enumerate(layers)]
    if not any(left):
        raise ValueError("This would remove every neuron of every layer; keep at least one.")
    with Transaction(model) as transaction:
        for number, kept in keep.items():
            cut_neurons(transaction, layers[number], kept)
    return model


def _kept_neurons(layers: tuple[Layer, ...], number: int, gone: Iterable[int]) -> list[int]:
    if not isinstance(number, int) or not 0 <= number < len(layers):
        raise ValueError(f"Layer {number!r} does not exist: the model has 0 to {len(layers) - 1}.")
    gone, num_neurons = set(gone), layers[number].feed_forward.num_neurons
    unknown = sorted(gone - set(range(num_neurons)))
    if unknown:
        raise ValueError(
            f"Neurons {unknown[:10]} of layer {number} ({layers[number].name}) do not exist: it has {num_neurons}, "
            "counted from 0 (a model that was pruned before counts the neurons it has left)."
        )
    return [neuron for neuron in range(num_neurons) if neuron not in gone]


def cut_neurons(transaction: Transaction, layer: Layer, kept: list[int], *, outgoing: Tensor | None = None) -> None:
    """Keep these neurons of `layer`, later. `outgoing` (D, F) takes the place of the output projection's weight."""
    part, num_neurons = layer.feed_forward, layer.feed_forward.num_neurons
    if len(kept) == num_neurons:
        return
    if (obstacle := neuron_obstacle(layer)) is not None:
        raise ValueError(obstacle)
    rows = [*kept, *(num_neurons + neuron for neuron in kept)] if part.is_fused else kept
    for projection in part.inputs:
        transaction.select(projection, rows=rows)
    transaction.select(part.output, columns=kept, weight=outgoing)
    for module in layer.module.modules():
        if getattr(module, "intermediate_size", None) == num_neurons:
            transaction.set(module, "intermediate_size", len(kept))


def neuron_obstacle(layer: Layer) -> str | None:
    """Why neurons of this layer cannot be cut, as a sentence; None if they can."""
    part, num_neurons = layer.feed_forward, layer.feed_forward.num_neurons
    if num_neurons == out_features(part.output) or layer.has_own_attention:
        return None  # a norm of the hidden states and one of the neurons would look alike
    linear = {id(p) for module in layer.module.modules() if is_projection(module) for p in module.parameters()}
    for name, parameter in layer.module.named_parameters():
        if id(parameter) not in linear and parameter.shape == (num_neurons,):
            return (
                f"{layer.name}.{name} holds one value for each of the {num_neurons} neurons, "
                "which this surgery does not know how to cut."
            )
    return None
