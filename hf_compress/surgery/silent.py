"""Which heads and neurons add nothing, so that they can be cut and the model computes what it did.

A head is silent when its columns of the output projection are all zeros, or when its values are; a neuron when its
column of the output projection is, or when it is always zero itself.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_compress.model.anatomy import Anatomy, FeedForward, Layer, Stack, matrix, module_names
from hf_compress.model.attention import Attention, Projection
from hf_compress.surgery.heads import head_obstacle
from hf_compress.surgery.neurons import neuron_obstacle
from hf_compress.surgery.stand_ins import NEEDS_A_HEAD

Gone = dict[int, list[int]]  # as `prune_heads` and `prune_neurons` take it


@torch.no_grad()
def silent_parts(
    model: nn.Module,
    parts: Anatomy,
    *,
    head_unit: Callable[[nn.Module], int] = lambda output: 1,
    neuron_unit: Callable[[nn.Module], int] = lambda output: 1,
    is_heard: Callable[[nn.Module], bool] = lambda output: False,
    layers: Sequence[int] | None = None,
) -> tuple[Gone, Gone]:
    """The heads and neurons of `model` that can go: attention -> heads, layer -> neurons.

    head_unit, neuron_unit  of an output projection: so many neighbouring columns go together or not at all
    is_heard                of an output projection: whether it looks at inputs whose column is zero (one scale for each
                            token is such a look), so that only those go that are zero themselves
    layers                  the layers that stay, by default all; heads and neurons of the others are not looked at

    Heads that share a key and value go together. An attention that cannot run without a head keeps one, as OPT's; so
    does each encoder or decoder in one of its self-attentions and in one of its cross-attentions, and a model with a
    cache in a layer of the first type; all layers together keep a neuron. What surgery cannot cut stays.
    """
    stays = range(len(parts.layers)) if layers is None else sorted(layers)
    mine = [parts.layers[i] for i in stays]
    names = module_names(model)
    heads = {a.name: [] for layer in mine for a in layer.attentions}
    for attention in (a for layer in mine for a in layer.attentions):
        if attention.num_heads and head_obstacle(attention, names) is None:
            unit, heard = head_unit(attention.output), is_heard(attention.output)
            heads[attention.name] = silent_heads(attention, unit=unit, is_heard=heard)
    for stack in parts.stacks:
        own = [layer for layer in stack.layers if layer in mine]
        alone = [[a] for layer in own for a in layer.attentions if type(a.module).__name__ in NEEDS_A_HEAD]
        for together in [*alone, *_needed(model, stack, own)]:
            if all(len(heads[a.name]) == a.num_heads for a in together) and any(a.num_heads for a in together):
                first = next(a for a in together if a.num_heads)
                del heads[first.name][: _run_of_heads(first, head_unit(first.output))]
    neurons = {}
    for number, layer in zip(stays, mine, strict=True):
        unit, heard = neuron_unit(layer.feed_forward.output), is_heard(layer.feed_forward.output)
        can_go = layer.feed_forward.num_neurons and neuron_obstacle(layer) is None
        neurons[number] = silent_neurons(layer.feed_forward, unit=unit, is_heard=heard) if can_go else []
    if any(neurons.values()) and sum(map(len, neurons.values())) == sum(x.feed_forward.num_neurons for x in mine):
        first = next(i for i in stays if neurons[i])
        del neurons[first][: neuron_unit(parts.layers[first].feed_forward.output)]
    numbers = {attention.name: number for number, attention in enumerate(a for x in parts.layers for a in x.attentions)}
    return {numbers[name]: gone for name, gone in heads.items() if gone}, {i: g for i, g in neurons.items() if g}


def silent_heads(attention: Attention, *, unit: int = 1, is_heard: bool = False) -> list[int]:
    heads = (attention.num_heads, attention.head_dim)
    group = attention.num_heads // attention.num_key_value_heads
    silent = _zero_rows(attention.value)[attention.value_rows]
    for name in {"v_bias"}.intersection(attention.head_biases):
        silent &= attention.module._parameters[name].detach() == 0
    silent = silent.unflatten(0, (-1, attention.head_dim)).all(1)
    silent = silent.repeat_interleave(group)  # (H,)
    if not is_heard:
        silent |= ~matrix(attention.output).detach().bool().any(dim=0).unflatten(0, heads).any(dim=1)
    return _whole_runs(silent, _run_of_heads(attention, unit))


def silent_neurons(part: FeedForward, *, unit: int = 1, is_heard: bool = False) -> list[int]:
    # act(0) = 0 for gelu, silu and relu; behind a gate it is enough that one factor is zero
    inputs = [_zero_rows(module) for module in part.inputs]
    if part.is_fused:
        inputs = list(inputs[0].chunk(2))
    silent = torch.stack(inputs).any(dim=0)  # (F,)
    if not is_heard:
        silent |= ~matrix(part.output).detach().bool().any(dim=0)
    return _whole_runs(silent, unit)


def _run_of_heads(attention: Attention, unit: int) -> int:
    """How many heads go together: those of a key and value, and as many as fill whole units of columns."""
    group = attention.num_heads // attention.num_key_value_heads
    return math.lcm(group * attention.head_dim, unit) // attention.head_dim


def _whole_runs(silent: Tensor, run: int) -> list[int]:
    """The numbers of those in runs of `run` neighbours of which all are silent."""
    if len(silent) % run:
        return []
    return silent.unflatten(0, (-1, run)).all(dim=1).repeat_interleave(run).nonzero().flatten().tolist()


def _needed(model: nn.Module, stack: Stack, stays: list[Layer]) -> list[list[Attention]]:
    """Sets of attentions of `stack` of which one has to keep a head, see `assign_slots`."""
    places = range(max((len(layer.attentions) for layer in stays), default=0))
    sets = [[layer.attentions[place] for layer in stays] for place in places]
    types = getattr(model.config, "layer_types", None)
    if types and len(types) == len(stack.layers) and getattr(stack.layers[0].attention.module, "is_causal", False):
        kinds = {layer.name: kind for layer, kind in zip(stack.layers, types, strict=True)}
        sets.append([layer.attention for layer in stays if kinds[layer.name] == kinds[stays[0].name]])
    return sets


def _zero_rows(module: Projection) -> Tensor:
    """(N,) True for outputs that are always zero: all weights zero, and the bias."""
    zero = ~matrix(module).detach().bool().any(dim=1)
    return zero if module.bias is None else zero & (module.bias.detach() == 0)
