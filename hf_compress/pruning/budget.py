"""A budget instead of knobs: heads, neurons and layers go, those first that are worth least for what they cost."""

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measuring.counting import multiply_adds, num_parameters
from hf_compress.measuring.measure import evaluating
from hf_compress.measuring.timing import synchronize, time_interleaved
from hf_compress.measuring.turns import LATENCY_BATCH
from hf_compress.model.anatomy import Anatomy, anatomy
from hf_compress.model.classes import ModelT
from hf_compress.model.inputs import example_batch
from hf_compress.model.unfinished import check_finished
from hf_compress.pruning.importance import every_other
from hf_compress.pruning.masks import check_prunable
from hf_compress.pruning.units import Unit, units
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

logger = logging.getLogger(__name__)

METRICS = ("parameters", "multiply_adds", "latency")
LATENCY_STEPS = 6  # halvings of the interval in which the right number of multiply-adds is sought
LATENCY_ROUNDS = 20
LEAST_SHARE = 0.25  # of two layers, for which they stay both


def prune(
    model: ModelT,
    dataloader: Iterable[Mapping[str, Tensor]],
    *,
    sparsity: float | None = None,
    metric: Literal["parameters", "multiply_adds", "latency"] = "parameters",
    sequence_length: int = 128,
    target: float | None = None,
    num_layers: int | None = None,
) -> ModelT:
    """Cut heads, neurons and layers until a share `sparsity` of the model is gone. Changes `model` and returns it.

    dataloader       batches with labels, all kept in memory, a few hundred examples. They tell what each piece is
                     worth: how much the loss of an example changes without it, on average; for heads and neurons
                     estimated by the gradient of their gates in one pass, for layers tried out, example by example
    sparsity         share of the metric that goes, between 0 and 1. No less goes, and at most one piece more where the
                     metric is counted
    metric           parameters (all of the model's); multiply_adds of one example; latency, the median time of one
                     example in turns with the model as it was, on the device where it is, with its threads
    sequence_length  tokens of the example for the last two
    target           what `sparsity` was called when it meant the share that is left; it goes with the next version
    num_layers       so many stay, evenly spaced, and of all of them the same share of heads and of neurons; which of
                     these is as above. Without, worth over cost decides

    Each piece is a head (with all that share its key and value), a bundle of neurons, or a whole layer. They go in the
    order of importance over cost, but no layer is left alone where two narrower ones cost as much (`choose`). Raises
    ValueError, and changes nothing, for a share that cannot be reached: embeddings and heads of the task stay, and
    something of each encoder and decoder.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    target = 1 - share_that_goes(sparsity, target)
    check_finished(model, "prune")
    check_prunable(model, "prune")
    check_num_layers(model, num_layers)
    tokens = None if metric == "parameters" else sequence_length
    found = units(model, dataloader, tokens, layers=num_layers is None)
    pieces = sorted(found, key=lambda unit: unit.importance / max(unit.cost, 1))
    if metric == "latency":
        chosen = _choose_by_latency(model, pieces, target, sequence_length, num_layers)
    else:
        total = num_parameters(model) if tokens is None else _multiply_adds(model, sequence_length)
        chosen = choose(anatomy(model), pieces, total - int(target * total), num_layers)
    return cut(model, chosen)


def share_that_goes(sparsity: float | None, target: float | None) -> float:
    """`sparsity`, or what is left beside `target`, with a warning. Raises ValueError for both, none, and no share."""
    if (sparsity is None) == (target is None):
        raise ValueError(f"Give sparsity, the share that goes: got sparsity={sparsity} and target={target}.")
    if sparsity is None:
        warnings.warn(
            f"target={target} is the share that is left, while all other shares say what goes. Say "
            f"sparsity={1 - target:g}: `target` goes with the next version of hf_compress.",
            FutureWarning,
            stacklevel=3,
        )
        sparsity = 1 - target
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is the share that goes, between 0 and 1, got {sparsity:g}.")
    return sparsity


def choose(parts: Anatomy, pieces: Sequence[Unit], surplus: int, num_layers: int | None = None) -> list[Unit]:
    """The first of `pieces` whose costs reach `surplus`, but for those that need not go: the last may be a whole layer.

    Where that would leave one layer alone, in a model of one stack, two stay that are as wide together: worth is of
    each layer in the whole model, and does not tell how little one can do by itself. With `num_layers` so many stay,
    evenly spaced and cut evenly. Raises ValueError if all together do not reach it.
    """
    if num_layers is not None:
        return _even(parts, pieces, surplus, num_layers)
    chosen = _first(parts, pieces, surplus)
    is_alone = len(parts.stacks) == 1 and len({unit.layer for unit in chosen if unit.is_layer}) == len(parts.layers) - 1
    if not is_alone or len(parts.layers) < 3:
        return chosen
    return _of_layers(parts, pieces, surplus, 2, least=LEAST_SHARE) or chosen


def check_num_layers(model: PreTrainedModel, num_layers: int | None) -> None:
    """Raise ValueError for a number of layers that cannot stay, before anything is measured for it."""
    parts = anatomy(model)
    if num_layers is None:
        return
    if len(parts.stacks) > 1:
        raise ValueError(f"num_layers={num_layers} is of models with one stack, and this one has {len(parts.stacks)}.")
    if not 1 <= num_layers <= len(parts.layers):
        raise ValueError(f"num_layers, those that stay, must lie between 1 and {len(parts.layers)}, got {num_layers}.")


def _even(parts: Anatomy, pieces: Sequence[Unit], surplus: int, num_layers: int) -> list[Unit]:
    chosen = _of_layers(parts, pieces, surplus, num_layers)
    if chosen is None:
        raise ValueError(f"So little cannot be left of {num_layers} layers, thin as they may be: let fewer stay.")
    return chosen


def _of_layers(
    parts: Anatomy, pieces: Sequence[Unit], surplus: int, number: int, least: float = 0.0
) -> list[Unit] | None:
    """All layers but `number`, evenly spaced, and of these the same share of heads and of neurons, those worth least.

    None where less than the share `least` of both would stay, or not even a head and a bundle of neurons of each.
    """
    depth = len(parts.layers)
    kept = every_other(depth, 1 - number / depth) if number < depth else range(depth)
    chosen = [unit for unit in pieces if unit.is_layer and unit.layer not in kept]
    inner = [unit for unit in pieces if not unit.is_layer and unit.layer in kept]
    left = surplus - _cost(chosen)
    if left > (1 - least) * _cost(inner):
        return None
    heads, neurons = [u for u in inner if u.heads], [u for u in inner if u.neurons]
    for group, others, rounded in ((heads, neurons, math.floor), (neurons, [], math.ceil)):  # neurons make up for heads
        share = max(left, 0) / max(_cost([*group, *others]), 1)
        for i in kept:
            own = sorted((unit for unit in group if unit.layer == i), key=lambda unit: unit.importance)
            chosen += own[: max(0, min(rounded(share * len(own)), len(own) - 1))]
        left = surplus - _cost(chosen)
    return _needed([(unit, unit.cost) for unit in chosen], -left) if left <= 0 else None


def _cost(chosen: Sequence[Unit]) -> int:
    return sum(unit.cost for unit in chosen)


def _first(parts: Anatomy, pieces: Sequence[Unit], surplus: int) -> list[Unit]:
    keepers = _Keepers(parts)
    chosen: list[tuple[Unit, int]] = []  # with what each saved
    spent: dict[int, int] = {}  # layer -> cost of what was taken from it
    saved = 0
    for unit in pieces:
        if saved >= surplus:
            break
        if keepers.may_go(unit):
            gain = unit.cost - (spent.get(unit.layer, 0) if unit.is_layer else 0)
            spent[unit.layer] = spent.get(unit.layer, 0) + gain
            saved += gain
            chosen.append((unit, gain))
    if saved < surplus:
        raise ValueError(
            f"The sparsity cannot be reached: {surplus:,} would have to go, and heads, neurons and layers together "
            f"have {saved:,}. Lower the sparsity, or make the embeddings smaller with prune_vocabulary or "
            "factorise_embeddings."
        )
    return _needed(chosen, saved - surplus)


def _needed(chosen: list[tuple[Unit, int]], spare: int) -> list[Unit]:
    """`chosen` without what may stay though `spare` is all that it may cost: what matters most comes back first."""
    gone = {unit.layer for unit, _ in chosen if unit.is_layer}
    needed = []
    for unit, gain in reversed(chosen):
        if gain <= spare and not unit.is_layer and unit.layer not in gone:
            spare -= gain
        else:
            needed.append(unit)
    return needed[::-1]


class _Keepers:
    """Sees to it that something of each stack stays: a layer with a head of each kind and a neuron."""

    def __init__(self, parts: Anatomy):
        self._stack = [stack.name for stack in parts.stacks for _ in stack.layers]
        attentions = [(i, place) for i, layer in enumerate(parts.layers) for place in range(len(layer.attentions))]
        self._kind = [(self._stack[i], place) for i, place in attentions]
        self._owner = [i for i, _ in attentions]
        self._heads = [attention.num_heads for attention in parts.attentions]
        self._neurons = [layer.feed_forward.num_neurons for layer in parts.layers]
        self._gone: set[int] = set()

    def may_go(self, unit: Unit) -> bool:
        """Whether `unit` is there and not the last of its kind; if so, it counts as gone from now on."""
        if unit.layer in self._gone:
            return False
        heads, neurons = list(self._heads), list(self._neurons)
        for attention, _ in unit.heads:
            heads[attention] -= 1
        neurons[unit.layer] -= len(unit.neurons)
        if unit.is_layer:
            neurons[unit.layer] = 0
            heads = [0 if owner == unit.layer else n for owner, n in zip(self._owner, heads, strict=True)]
        by_kind: dict[tuple[str, int], int] = dict.fromkeys(self._kind, 0)
        for kind, count in zip(self._kind, heads, strict=True):
            by_kind[kind] += count
        by_stack: dict[str, int] = dict.fromkeys(self._stack, 0)
        for stack, count in zip(self._stack, neurons, strict=True):
            by_stack[stack] += count
        if not all(by_kind.values()) or not all(by_stack.values()):
            return False
        self._heads, self._neurons = heads, neurons
        if unit.is_layer:
            self._gone.add(unit.layer)
        return True


def cut(model: PreTrainedModel, chosen: Sequence[Unit]) -> PreTrainedModel:
    layers = {unit.layer for unit in chosen if unit.is_layer}
    heads: dict[int, list[int]] = {}
    neurons: dict[int, list[int]] = {}
    for unit in chosen:
        if unit.layer not in layers:
            for attention, head in unit.heads:
                heads.setdefault(attention, []).append(head)
            neurons.setdefault(unit.layer, []).extend(unit.neurons)
    logger.info("cutting %d heads, %d neurons and %d layers", sum(map(len, heads.values())),
                sum(map(len, neurons.values())), len(layers))  # fmt: skip
    prune_heads(model, heads)
    prune_neurons(model, neurons)
    if layers:
        prune_layers(model, [i for i in range(len(anatomy(model).layers)) if i not in layers])
    return model


def _multiply_adds(model: PreTrainedModel, sequence_length: int) -> int:
    with evaluating([model]):
        batch = example_batch(model, sequence_length=sequence_length)
        return multiply_adds(model, {key: value[:LATENCY_BATCH] for key, value in batch.items()})


def _choose_by_latency(
    model: PreTrainedModel, pieces: Sequence[Unit], target: float, sequence_length: int, num_layers: int | None
) -> list[Unit]:
    """The fewest pieces with which a copy of the model is fast enough, found by halving the multiply-adds left."""
    parts, total = anatomy(model), _multiply_adds(model, sequence_length)
    batch = example_batch(model, sequence_length=sequence_length)
    batch = {key: value[:LATENCY_BATCH] for key, value in batch.items()}
    best: list[Unit] | None = None
    low, high = 0.0, 1.0  # shares of multiply-adds: too few is sure to be fast enough, all of them is not
    ratio = 1.0
    for _ in range(LATENCY_STEPS):
        share = (low + high) / 2
        try:
            chosen = choose(parts, pieces, total - int(share * total), num_layers)
        except ValueError:
            low = share
            continue
        ratio = _latency_ratio(cut(copy.deepcopy(model), chosen), model, batch)
        logger.info("with %.1f%% of the multiply-adds it takes %.1f%% of the time", 100 * share, 100 * ratio)
        if ratio <= target:
            best, low = chosen, share
        else:
            high = share
    if best is None:
        raise ValueError(f"The sparsity cannot be reached: the smallest model tried takes {ratio:.2f} of the time.")
    return best


def _latency_ratio(candidate: PreTrainedModel, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> float:
    def forward(network: PreTrainedModel) -> None:
        with torch.inference_mode():
            network(**batch)
        synchronize(network.device)

    with evaluating([candidate, model]):
        calls = [lambda network=network: forward(network) for network in (candidate, model)]
        seconds = time_interleaved(calls, rounds=LATENCY_ROUNDS, steady=True)
    ratios = sorted(one / other for one, other in zip(*seconds, strict=True))
    return ratios[len(ratios) // 2]
