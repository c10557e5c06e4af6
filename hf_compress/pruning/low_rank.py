"""Linear maps as products of two thin matrices, by their singular values: a rank, a share of energy, or a budget.

Prabhavalkar et al., 2016, https://arxiv.org/abs/1603.08042

    W (N, K) ~ U_r S_r V_r^T = table (N, r) @ projection (K, r)^T, smaller than W if r < N K / (N + K)

Maps W_i that share an input may share the projection P (eq. 62 to 65 of the text survey): that of the maps one above
the other, with the least sum of squared errors. Its columns are orthonormal, so that table_i = W_i P is what eq. 65
asks for, the least squares argmin over Y of |Y P^T - W_i|^2.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.layers.low_rank import factors, low_rank_class, make_low_rank, share_projection
from hf_compress.model.anatomy import anatomy, layer_maps
from hf_compress.model.classes import ModelT
from hf_compress.model.record import read_part, stored_name, write_part
from hf_compress.model.unfinished import check_finished, check_loaded
from hf_compress.pruning.masks import check_prunable


@torch.no_grad()
def factorise(
    model: ModelT,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    shared: bool = False,
    skip_modules: Sequence[str] = (),
) -> ModelT:
    """Changes `model` and returns it: linear maps within the layers become products of two thin matrices.

    Args: one of the first three.
        rank: of each map.
        energy: the smallest rank whose singular values hold this share of the sum of their squares.
        budget: the share of the maps' weights that may stay; ranks go where they keep most of their map's energy for
            what they cost.
        shared: maps that share an input (query, key and value; gate and up) have one projection, which is stored once;
            rank, energy and budget are then those of such maps together.
        skip_modules: names, or regular expressions that match whole names, of maps to leave alone.

    Maps that would not get smaller stay as they are. The result trains (best with the model as it was for a teacher),
    is saved and loads like any other model, with hf_compress imported; its maps are no longer cut or quantized. Raises
    ValueError, and changes nothing, where no map would get smaller, and for maps that have no such form (`Conv1D`).
    """
    given = {"rank": rank, "energy": energy, "budget": budget}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"Give one of rank, energy and budget, got {given}.")
    if (rank is not None and rank < 1) or any(x is not None and not 0 < x < 1 for x in (energy, budget)):
        raise ValueError(f"rank is 1 or more, energy and budget are shares between 0 and 1, got {given}.")
    check_loaded(model, "factorise")
    check_finished(model, "factorise")
    check_prunable(model, "factorise")
    maps = _chosen(model, skip_modules)
    groups = _groups(model, maps) if shared else {name: [name] for name in maps}

    def stacked(first: str) -> Tensor:
        weights = [maps[name].weight for name in groups[first]]
        return weights[0] if len(weights) == 1 else torch.cat(weights)  # (sum of N, K)

    spectra = {name: torch.linalg.svdvals(_exact(stacked(name))) for name in groups}
    shapes = {name: tuple(stacked(name).shape) for name in groups}
    if budget is not None:
        ranks = ranks_of_budget(spectra, shapes, budget)
    else:
        ranks = {name: rank or rank_of_energy(spectrum, energy) for name, spectrum in spectra.items()}
    ranks = {name: r for name, r in ranks.items() if r * sum(shapes[name]) < shapes[name][0] * shapes[name][1]}
    if not ranks:
        raise ValueError(f"With {given} no map would get smaller: a rank must be below N * K / (N + K) of its map.")
    for first, r in ranks.items():
        modules = [maps[name] for name in groups[first]]
        table, projection = factors(stacked(first), r)
        projection = nn.Parameter(projection, requires_grad=modules[0].weight.requires_grad)
        for module, part in zip(modules, table.split([len(module.weight) for module in modules]), strict=True):
            make_low_rank(module, nn.Parameter(part.clone(), requires_grad=module.weight.requires_grad), projection)
        for module in modules[1:]:
            share_projection(module, modules[0])
    known = {name: r for first, r in ranks.items() for name in groups[first]}
    record_ranks(model, known, {name: first for first in ranks for name in groups[first][1:]})
    return model


def rank_of_energy(spectrum: Tensor, energy: float) -> int:
    """The smallest rank whose singular values, the largest of `spectrum`, hold the share `energy` of the squares."""
    held = spectrum.square().cumsum(0) / spectrum.square().sum().clamp(min=torch.finfo(spectrum.dtype).tiny)
    return min(int((held < energy).sum()) + 1, len(spectrum))


def ranks_of_budget(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: float
) -> dict[str, int]:
    """The ranks that keep most energy, summed over maps as shares of each map's own, in a share of the weights.

    Component after component by energy over weights, N + K each, until the next one does not fit; each map keeps one.
    """
    sizes = {name: sum(shape) for name, shape in shapes.items()}
    left = budget * sum(N * K for N, K in shapes.values()) - sum(sizes.values())
    if left < 0:
        raise ValueError(f"budget={budget} is too small: one rank of each map takes more.")
    ranks, worth = dict.fromkeys(spectra, 1), []
    for name, spectrum in spectra.items():
        share = spectrum.square() / spectrum.square().sum().clamp(min=torch.finfo(spectrum.dtype).tiny)
        worth += [(float(part) / sizes[name], name) for part in share[1:]]
    for _, name in sorted(worth, key=lambda one: -one[0]):  # stable: of one map the larger come first
        if sizes[name] > left:
            break
        left -= sizes[name]
        ranks[name] += 1
    return ranks


def record_ranks(model: PreTrainedModel, ranks: Mapping[str, int], shared: Mapping[str, str] | None = None) -> None:
    """Changes `model`: its config's record says which modules are products, of which rank, with whose projection."""
    structure = read_part(model.config, "structure")
    found = {
        "ranks": {stored_name(model, name): rank for name, rank in ranks.items()},
        "shared": {stored_name(model, name): stored_name(model, owner) for name, owner in (shared or {}).items()},
    }
    found = {part: {**structure.get(part, {}), **entries} for part, entries in found.items()}
    write_part(model.config, "structure", structure | {part: entries for part, entries in found.items() if entries})


def _groups(model: PreTrainedModel, maps: Mapping[str, nn.Linear]) -> dict[str, list[str]]:
    """The names of maps that read the same input, by the first of them; all others alone."""
    names, together = {module: name for name, module in maps.items()}, []
    for layer in anatomy(model).layers:
        for a in layer.attentions:
            together += [(a.query,), (a.key, a.value)] if a.is_cross else [(a.query, a.key, a.value)]
        together.append(layer.feed_forward.inputs)
    found = [[names.pop(module) for module in modules if module in names] for modules in together]
    return {group[0]: group for group in [*found, *([name] for name in names.values())] if group}


def _exact(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _chosen(model: PreTrainedModel, skip_modules: Sequence[str]) -> dict[str, nn.Linear]:
    maps = {name: module for name, module in layer_maps(model).items() if "weight" in module._parameters}
    for pattern in skip_modules:
        if not any(re.fullmatch(pattern, name) for name in maps):
            raise ValueError(f"skip_modules: no linear map in the layers is called {pattern!r}.")
    maps = {n: m for n, m in maps.items() if m.weight.numel() and not any(re.fullmatch(p, n) for p in skip_modules)}
    for module in maps.values():
        low_rank_class(type(module))  # raises before anything has changed
    if not maps:
        raise ValueError(f"{type(model).__name__} has no plain linear map left in its layers.")
    return maps
