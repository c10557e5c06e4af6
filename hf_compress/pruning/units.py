"""What can be taken out of a model, piece by piece: what each piece costs and what it is worth."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import Anatomy, Layer, anatomy, in_features, out_features
from hf_compress.model.attention import Attention, Projection
from hf_compress.model.calibration_data import first_batches
from hf_compress.pruning.importance.gates import labelled_batch, loss_shares, mean_absolute_gradients
from hf_compress.pruning.importance.layers import skipped
from hf_compress.training.progress import progress_bar

NEURON_BUNDLES = 64  # the neurons of a layer, sorted by importance, are taken in so many bundles


@dataclass(frozen=True)
class Unit:
    """Heads of one group, a bundle of neurons, or a whole layer."""

    layer: int  # place in `anatomy(model).layers`
    heads: tuple[tuple[int, int], ...]  # (attention, head), numbered as `prune_heads` does
    neurons: tuple[int, ...]
    cost: int
    importance: float  # mean over examples of how much the loss changes without it; of heads and neurons by gradient

    @property
    def is_layer(self) -> bool:
        return not self.heads and not self.neurons


def units(
    model: PreTrainedModel, dataloader: Iterable[Mapping[str, Tensor]], tokens: int | None, *, layers: bool = True
) -> list[Unit]:
    """Everything that may go. Costs are multiply-adds of a sequence of `tokens`, or parameters where that is None.

    layers  False leaves whole layers untried, which takes most of the time: their importance is 0
    """
    parts, batches = anatomy(model), list(first_batches(dataloader))
    attentions, forwards = parts.attentions, [layer.feed_forward.output for layer in parts.layers]
    modules = [*(a.output for a in attentions), *forwards]
    widths = [*(a.head_dim for a in attentions), *(1 for _ in forwards)]
    with evaluating([model]):
        rows = mean_absolute_gradients(model, batches, modules, widths)
        worths = _layer_worths(model, parts, batches) if layers else [0.0] * len(parts.layers)
    heads, neurons = rows[: len(attentions)], rows[len(attentions) :]
    found: list[Unit] = []
    number = 0
    for i, layer in enumerate(parts.layers):
        own: list[Unit] = []
        for attention in layer.attentions:
            own += _head_units(i, number, attention, heads[number], tokens)
            number += 1
        own += _neuron_units(i, layer, neurons[i], tokens)
        found += [*own, Unit(i, (), (), _layer_cost(layer, own, tokens), worths[i])]
    return found


@torch.no_grad()
def _layer_worths(model: PreTrainedModel, parts: Anatomy, batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Mean over examples of |loss without the layer - loss|, tried out.

    A first-order estimate fails for so much at once: the parts' gradients cancel, and it would call most layers free.
    """
    sums, num_examples = [0.0] * len(parts.layers), 0
    for batch in progress_bar(batches, desc="Leaving layers out", unit="batch"):
        batch = labelled_batch(model, batch)
        valid = loss_shares(model, batch) > 0
        for row in valid.nonzero().flatten().tolist():
            example = {key: value[row : row + 1] for key, value in batch.items()}
            loss = float(model(**example).loss)
            for i, layer in enumerate(parts.layers):
                with skipped([layer.module]):
                    sums[i] += abs(float(model(**example).loss) - loss)
            num_examples += 1
    return [total / num_examples for total in sums]


def _head_units(layer: int, number: int, attention: Attention, importance: Tensor, tokens: int | None) -> list[Unit]:
    """Heads one by one, or group by group where they share a key and value."""
    groups = attention.num_key_value_heads
    if not groups:
        return []
    size, members = attention.head_dim, attention.num_heads // groups
    queries = [] if attention.is_fused else [attention.query, *attention.positional]
    pairs = [] if attention.is_fused else [attention.key, attention.value]
    cost = sum(_cost(module, rows=members * size, tokens=tokens) for module in queries)
    cost += sum(_cost(module, rows=size, tokens=tokens) for module in pairs)
    if attention.is_fused:
        cost += _cost(attention.query, rows=(members + 2) * size, tokens=tokens)
    cost += _cost(attention.output, columns=members * size, tokens=tokens)
    if tokens is not None:
        cost += members * 2 * tokens * tokens * size  # q k^T, and the weights times v
    found = []
    for group in range(groups):
        heads = tuple((number, group * members + i) for i in range(members))
        found.append(Unit(layer, heads, (), cost, float(sum(importance[head] for _, head in heads))))
    return found


def _neuron_units(number: int, layer: Layer, importance: Tensor, tokens: int | None) -> list[Unit]:
    part = layer.feed_forward
    rows_per_neuron = 2 if part.is_fused else 1
    cost = sum(_cost(module, rows=rows_per_neuron, tokens=tokens) for module in part.inputs)
    cost += _cost(part.output, columns=1, tokens=tokens)
    order = importance.argsort().tolist()
    size = max(1, -(-part.num_neurons // NEURON_BUNDLES))
    bundles = [order[start : start + size] for start in range(0, len(order), size)]
    return [Unit(number, (), tuple(bundle), cost * len(bundle), float(importance[bundle].sum())) for bundle in bundles]


def _cost(module: Projection, *, rows: int | None = None, columns: int | None = None, tokens: int | None) -> int:
    """Of that many rows with their biases, or of that many columns."""
    weights = rows * in_features(module) if columns is None else columns * out_features(module)
    if tokens is not None:
        return tokens * weights
    return weights + (rows if columns is None and module.bias is not None else 0)


def _layer_cost(layer: Layer, own: Sequence[Unit], tokens: int | None) -> int:
    if tokens is not None:  # norms and additions are not counted
        return sum(unit.cost for unit in own)
    return sum(parameter.numel() for parameter in layer.module.parameters())
