"""What is tied to a packed table: heads and other embeddings hold no weight of their own and refer to it instead."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hf_compress.layers.packed_embedding import PackedEmbedding, TiedEmbedding, TiedHead

PAIRS = ("_tied_weights_keys", "all_tied_weights_keys")  # where Transformers keeps target -> source


def untie_packed(model: PreTrainedModel) -> None:
    """Changes `model`: modules tied to a packed embedding use it, and Transformers ties them no more."""
    for target, source in list(model.all_tied_weights_keys.items()):
        table = model.get_submodule(source.rpartition(".")[0])
        if not isinstance(table, PackedEmbedding):
            continue
        name = target.rpartition(".")[0]
        module = model.get_submodule(name)
        tied = TiedHead(table, module.bias) if isinstance(module, nn.Linear) else TiedEmbedding.like(module, table)
        tied._is_hf_initialized = True
        model.set_submodule(name, tied.train(module.training))
        _forget(model, target)


def _forget(model: PreTrainedModel, target: str) -> None:
    for prefix, part in model.named_modules():
        inside = target.removeprefix(f"{prefix}.")
        for attribute in PAIRS:
            pairs = getattr(part, attribute, None)
            if isinstance(pairs, dict) and inside in pairs:
                setattr(part, attribute, {key: value for key, value in pairs.items() if key != inside})


def tied_modules(model: nn.Module) -> dict[str, TiedHead | TiedEmbedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (TiedHead, TiedEmbedding))}


def restore_ties(model: PreTrainedModel, tied: Mapping[str, tuple[TiedHead | TiedEmbedding, str]]) -> None:
    """Changes `model`: modules tied to tables that are ordinary again become so too. tied: {name: (module, table)}."""
    for name, (module, table) in tied.items():
        weight = model.get_submodule(table).weight
        if isinstance(module, TiedEmbedding):
            ordinary = module.unpacked(weight)
        else:
            ordinary = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            ordinary.weight, ordinary.bias = weight, module.bias
        model.set_submodule(name, ordinary)
    if tied:
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        for part in parts:
            vars(part).pop("_tied_weights_keys", None)
        for part in parts:
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
