"""Low-rank modules in a model that is about to be loaded, and the ties between their factors."""

import torch
from torch import nn

from hf_compress.layers.low_rank import (
    FACTORS,
    LowRank,
    LowRankEmbedding,
    LowRankLinear,
    make_low_rank,
    share_projection,
)


def retie_low_rank(model: nn.Module) -> None:
    """Changes `model`: pairs of tied weights that are low-rank now are tied by both factors, also when loading."""
    if not hasattr(model, "all_tied_weights_keys"):
        return
    low_rank = {name for name, module in model.named_modules() if isinstance(module, LowRank)}
    model.all_tied_weights_keys = _factor_pairs(model.all_tied_weights_keys, low_rank)
    for prefix, part in model.named_modules():
        if isinstance(getattr(part, "_tied_weights_keys", None), dict):
            inside = {name[len(prefix) :].lstrip(".") for name in low_rank if name.startswith(prefix)}
            part._tied_weights_keys = _factor_pairs(part._tied_weights_keys, inside)
    model.tie_weights(recompute_mapping=False)


def _factor_pairs(pairs: dict[str, str], low_rank: set[str]) -> dict[str, str]:
    found = {}
    for target, source in pairs.items():
        names = (target.removesuffix(".weight"), source.removesuffix(".weight"))
        if set(names) <= low_rank:
            found.update({f"{names[0]}.{factor}": f"{names[1]}.{factor}" for factor in FACTORS})
        else:
            found[target] = source
    return found


def prepare_low_rank(stored: str, module: nn.Module, rank: int) -> None:
    """Changes `module`, on the meta device: it waits for two factors. Raises ValueError for a rank it cannot have."""
    if not isinstance(module, (nn.Linear, nn.Embedding)) or "weight" not in module._parameters:
        raise ValueError(f"structure: {stored!r} is a {type(module).__name__}, which has no low-rank form.")
    rows, columns = module.weight.shape
    if rank > min(rows, columns):
        raise ValueError(f"structure: {stored!r} has the rank {rank}, beyond its shape {[rows, columns]}.")
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    factors = [nn.Parameter(torch.empty(size, rank, **like)) for size in (rows, columns)]
    make_low_rank(module, *factors)
    module.is_loading = True
    # a subclass may have buffers that only its initialisation fills, e.g. Gemma's scale
    module._is_hf_initialized = type(module) in (LowRankEmbedding, LowRankLinear)


def prepare_shared(stored: str, module: nn.Module, other: str, owner: nn.Module | None) -> None:
    """Changes `module`: it waits for a table alone. Raises ValueError for an owner whose projection is not its own."""
    fits = type(module) is LowRankLinear and type(owner) is LowRankLinear and module is not owner
    if not fits or module.projection.shape != owner.projection.shape:
        raise ValueError(f"structure: {stored!r} cannot share the projection of {other!r}: two maps of one rank can.")
    share_projection(module, owner)
