"""Which rows and columns of the teacher's weights a narrower student takes: those with the largest norm."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_compress.model.anatomy import Anatomy, FeedForward, Stack, in_features, module_names
from hf_compress.model.attention import Attention
from hf_compress.model.weights import as_matrix
from hf_compress.surgery.stand_ins import BIAS_TABLE

Axes = tuple[Tensor | None, ...]  # the indices taken of each axis of a weight (N, K); None for all of them
NORM_OF_HEADS = re.compile(r"\b(q|k|query|key)_(layer_?)?norm\b")


def layer_slices(teacher: nn.Module, source: Anatomy, target: Anatomy, kept: list[list[int]]) -> dict[str, Axes]:
    """Name of a tensor of the teacher's layers -> what a student of the shape `target` takes of it."""
    names, chosen = module_names(teacher), {}
    for old, new, numbers in zip(source.stacks, target.stacks, kept, strict=True):
        for place in range(len(old.layers[0].attentions)):
            chosen.update(_attention_slices(names, old, new, numbers, place))
        for mine, number in zip(new.layers, numbers, strict=True):
            chosen.update(_feed_forward_slices(names, mine.feed_forward, old.layers[number].feed_forward))
    return chosen


def largest(norms: Tensor, number: int) -> Tensor:
    """Indices of the `number` largest, ascending; fewer when there are not as many."""
    return norms.topk(min(number, len(norms))).indices.sort().values


def hidden_norms(weights: Iterable[Tensor], hidden_size: int) -> Tensor:
    """How much weight lies on each hidden dimension, (D,): the squared norm of all matrices' rows or columns for it."""
    norms = torch.zeros(hidden_size)
    for weight in {id(w): w for w in weights}.values():
        if weight.dim() == 2 and weight.is_floating_point():
            for axis in (0, 1):
                if weight.shape[axis] == hidden_size:
                    norms += weight.float().square().sum(dim=1 - axis).cpu()
    return norms


def _energy(module: nn.Module) -> Tensor:
    """(K,) the squared norm of each column of a linear map."""
    return as_matrix(module, module.weight.detach()).float().cpu().square().sum(dim=0)


def _attention_slices(names: dict, old: Stack, new: Stack, numbers: list[int], place: int) -> dict[str, Axes]:
    """The heads, and dimensions within them, of the self-attentions or cross-attentions of a stack.

    Where layers share a position bias for each head, all give the same heads.
    """
    theirs = [layer.attentions[place] for layer in old.layers]
    mine = [layer.attentions[place] for layer in new.layers]
    energies = [_energy(theirs[number].output) for number in numbers]
    owners = {
        old.name.rpartition(".")[0],
        *(attention.name for attention in theirs),
    }  # MPNet's, T5's
    biases = [name for name in names.values() if name in {f"{owner}.{BIAS_TABLE}" for owner in owners}]
    if biases:
        energies = [torch.stack(energies).sum(dim=0)] * len(energies)
    chosen: dict[str, Axes] = {}
    for own, number, energy in zip(mine, numbers, energies, strict=True):
        heads, groups, within = _heads(own, theirs[number], energy)
        chosen.update(_projection_slices(names, theirs[number], heads, groups, within))
        chosen.update({f"{name}.weight": (None, heads) for name in biases})
    return chosen


def _heads(mine: Attention, theirs: Attention, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which heads, which key-value heads, and which dimensions within each head the student takes."""
    Dh, new_Dh, num_groups = theirs.head_dim, mine.head_dim, theirs.num_key_value_heads
    if not num_groups:
        return (torch.arange(0),) * 3
    columns = energy.view(num_groups, -1, Dh)  # (groups, heads of a group, Dh)
    groups = largest(columns.sum(dim=(1, 2)), mine.num_key_value_heads)
    size = mine.num_heads // max(mine.num_key_value_heads, 1)
    members = torch.stack([largest(columns[g].sum(dim=1), size) for g in groups.tolist()])  # (groups, size)
    heads = (groups[:, None] * columns.shape[1] + members).flatten()
    within = torch.arange(Dh)
    if new_Dh < Dh:  # the same dimensions in every head; halves together, as rotary embeddings pair them
        norms = columns.sum(dim=(0, 1))
        if Dh % 2 == new_Dh % 2 == 0:
            first = largest(norms.view(2, -1).sum(dim=0), new_Dh // 2)
            within = torch.cat([first, first + Dh // 2])
        else:
            within = largest(norms, new_Dh)
    return heads, groups, within


def _projection_slices(
    names: dict, theirs: Attention, heads: Tensor, groups: Tensor, within: Tensor
) -> dict[str, Axes]:
    Dh, num_groups = theirs.head_dim, theirs.num_key_value_heads
    query, key = _rows(heads, Dh, within), _rows(groups, Dh, within)
    chosen: dict[str, Axes] = {}
    if theirs.is_fused and theirs.row_order is not None:
        blocks = theirs.blocks(heads.tolist(), groups.tolist())
        chosen.update(_placed(names, theirs.query, _rows(torch.tensor(blocks), Dh, within)))
    elif not theirs.is_fused:
        for module, rows in ((theirs.query, query), (theirs.key, key), (theirs.value, key)):
            chosen.update(_placed(names, module, rows))
    for module in theirs.positional:
        chosen.update(_placed(names, module, query))
    chosen.update({f"{theirs.name}.{name}": (query,) for name in theirs.head_biases})
    sizes = {(Dh,): within, (theirs.num_heads * Dh,): query, (num_groups * Dh,): key}
    for name, parameter in theirs.module.named_parameters():  # norms of queries and keys: of one head, or of all
        if NORM_OF_HEADS.search(name) and tuple(parameter.shape) in sizes:
            chosen[f"{theirs.name}.{name}"] = (sizes[tuple(parameter.shape)],)
    return chosen | _placed(names, theirs.output, columns=query)


def _rows(heads: Tensor, head_dim: int, within: Tensor) -> Tensor:
    return (heads[:, None] * head_dim + within).flatten()


def _placed(
    names: dict, module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None
) -> dict[str, Axes]:
    placed: dict[str, Axes] = {f"{names[module]}.weight": (rows, columns)}
    return placed | {f"{names[module]}.bias": (rows,)} if rows is not None else placed


def _feed_forward_slices(names: dict, mine: FeedForward, theirs: FeedForward) -> dict[str, Axes]:
    neurons = largest(_energy(theirs.output), in_features(mine.output))
    rows = torch.cat([neurons, neurons + theirs.num_neurons]) if theirs.is_fused else neurons
    placed = _placed(names, theirs.output, columns=neurons)
    for module in theirs.inputs:
        placed.update(_placed(names, module, rows))
    return placed
