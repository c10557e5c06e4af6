"""Whole layers, taken out for good, and the config shortened to match."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_compress.model.anatomy import Anatomy, anatomy, in_features, is_readable
from hf_compress.model.classes import ModuleT
from hf_compress.model.record import read_part, stored_name
from hf_compress.model.unfinished import check_finished
from hf_compress.surgery.cache import assign_slots
from hf_compress.surgery.depth import DEPTH_FIELDS, cache_depth, per_layer_changes
from hf_compress.surgery.other_layers import prune_other_layers
from hf_compress.surgery.position_bias import first_may_go, move_position_bias
from hf_compress.surgery.transaction import Transaction

OF_ENCODER = "attention_window"  # the list that LED has, of its encoder's layers alone
OF_EACH_HEAD = "contact_head.regression"  # what ESM has beside its layers: it reads the attention of every head


def prune_layers(model: ModuleT, keep: Sequence[int]) -> ModuleT:
    """Keep the layers numbered in `keep`, in that order. Changes `model` and its config, and returns it.

    Layers are numbered as in `anatomy(model).layers`: those of an encoder before those of a decoder, from 0.
    Raises ValueError, and changes nothing, for layers that do not exist, that are named twice, or if an encoder or a
    decoder would be left without any.
    """
    check_finished(model, "prune_layers")
    if not is_readable(model):
        prune_other_layers(model, keep)
        return model
    parts = anatomy(model)
    with Transaction(model) as transaction:
        cut_layers(transaction, parts, keep)
    return model


def cut_layers(
    transaction: Transaction, parts: Anatomy, keep: Sequence[int], num_heads: Mapping[str, int] | None = None
) -> None:
    """Keep these layers, later. `num_heads` names the attentions whose number of heads changes with the same cut."""
    model, kept = transaction.model, kept_by_stack(parts, list(keep))
    changes = _config_changes(model.config, parts, kept)
    transaction.structure["layers"] = _origin(model, parts, kept, list(changes))
    for part in ("ranks", "shared"):
        if entries := read_part(model.config, "structure").get(part):
            transaction.structure[part] = _renumbered(entries, model, parts, kept)
    for field, value in (changes | cache_depth(model.config, [len(numbers) for numbers in kept])).items():
        transaction.set(model.config, field, value)
    for name, module in model.named_modules():
        if name.endswith(OF_EACH_HEAD) and len(kept) == 1:
            heads = range(in_features(module) // len(parts.layers))
            transaction.select(module, columns=[i * len(heads) + head for i in kept[0] for head in heads])
    for stack, numbers in zip(parts.stacks, kept, strict=True):
        blocks = [stack.modules[i] for i in numbers]
        transaction.replace(stack.name, lambda old, blocks=blocks: type(old)(blocks))
        move_position_bias(transaction, stack, numbers[0], num_heads or {})
        for i, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    transaction.set(module, "layer_idx", i)
        layer_types = changes.get("layer_types", getattr(model.config, "layer_types", None))
        assign_slots(transaction, [stack.layers[i] for i in numbers], layer_types, num_heads or {})


def kept_by_stack(parts: Anatomy, keep: list[int]) -> list[list[int]]:
    """For each stack the layers to keep, numbered within the stack.

    Raises ValueError for layers that do not exist or are named twice, where a stack would be left without any, and
    where its first layer, which the others need in a way not known here, would go.
    """
    num_layers = len(parts.layers)
    unknown = [i for i in keep if not isinstance(i, int) or not 0 <= i < num_layers]
    if unknown or len(set(keep)) < len(keep):
        raise ValueError(f"keep must name layers from 0 to {num_layers - 1}, each at most once, got {keep}.")
    kept, first = [], 0
    for stack in parts.stacks:
        kept.append([i - first for i in keep if first <= i < first + len(stack.layers)])
        if not kept[-1]:
            raise ValueError(f"keep={keep} leaves no layer in {stack.name}; keep at least one of its layers.")
        first += len(stack.layers)
        if kept[-1][0] != 0 and not first_may_go(stack):
            raise ValueError(f"The first layer of {stack.name} must stay first: it holds the position bias of all.")
    return kept


def _origin(model: nn.Module, parts: Anatomy, kept: list[list[int]], fields: list[str]) -> dict[str, Any]:
    """Which layers of which config these are, by the numbers of the first model that was cut."""
    names = [stored_name(model, stack.name) for stack in parts.stacks]
    before = read_part(model.config, "structure").get("layers") or {
        "config": {field: getattr(model.config, field) for field in fields},
        "keep": {name: list(range(len(stack.layers))) for name, stack in zip(names, parts.stacks, strict=True)},
    }
    keep = {name: [before["keep"][name][i] for i in numbers] for name, numbers in zip(names, kept, strict=True)}
    return {"config": before["config"], "keep": keep}


def _renumbered(entries: Mapping[str, Any], model: nn.Module, parts: Anatomy, kept: list[list[int]]) -> dict[str, Any]:
    """What the record says of factorised modules, under the names that these have when the layers are cut."""

    def new(name: str) -> str | None:
        for stack, numbers in zip(parts.stacks, kept, strict=True):
            prefix = f"{stored_name(model, stack.name)}."
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                return f"{prefix}{numbers.index(int(number))}.{rest}" if int(number) in numbers else None
        return name

    named = {new(name): new(value) if isinstance(value, str) else value for name, value in entries.items()}
    return {name: value for name, value in named.items() if name is not None}


def _config_changes(config, parts: Anatomy, kept: list[list[int]]) -> dict[str, Any]:
    depths = [len(stack.layers) for stack in parts.stacks]
    fields = next((names for names in DEPTH_FIELDS if [getattr(config, name, None) for name in names] == depths), None)
    if fields is None:
        raise ValueError(
            f"{type(config).__name__} has no field that says the model has {depths} layers (looked for {DEPTH_FIELDS})."
        )
    changes: dict[str, Any] = {name: len(numbers) for name, numbers in zip(fields, kept, strict=True)}
    listed = per_layer_changes(config, depths[0], kept[0])
    return changes | (listed if len(depths) == 1 else {n: v for n, v in listed.items() if n == OF_ENCODER})
