"""Attention heads, cut out for good: rows of query, key and value, columns of the output projection."""

from collections.abc import Iterable, Mapping

from torch import nn

from hf_compress.model.anatomy import Anatomy, module_names
from hf_compress.model.attention import ROW_ORDERS, Attention
from hf_compress.model.classes import ModuleT
from hf_compress.model.cuttable import cuttable
from hf_compress.model.unfinished import check_finished
from hf_compress.surgery.cache import assign_slots
from hf_compress.surgery.position_bias import BIASED, has_unknown_bias, keep_position_bias
from hf_compress.surgery.stand_ins import BIAS_TABLE, COUNTS_HEADS, NEEDS_A_HEAD, HeadlessAttention, config_of_heads
from hf_compress.surgery.transaction import Transaction

BY_WIDTH = (  # beside Longformer's, which have projections of what sees all tokens
    "GPTBigCodeAttention", "LEDDecoderAttention", "MvpAttention", "TrOCRAttention", "XGLMAttention",
)  # fmt: skip


def prune_heads(model: ModuleT, heads: Mapping[int, Iterable[int]]) -> ModuleT:
    """Remove attention heads. Changes `model` and its config, and returns it.

    `heads` maps an attention to the heads that go, both counted from 0. An attention's number is its place in
    `anatomy(model).attentions`, the row of `head_importance`; that is its layer's number wherever a layer holds one
    attention. In an encoder-decoder each decoder layer counts twice: itself, then the encoder; in ALBERT one stands for
    all layers. Any number may go, differently in each layer, all of them too. Heads that share a key and value (grouped
    queries) must go in equal numbers from each group that stays; a group that loses all its heads loses its key and
    value as well.

    Raises ValueError, and changes nothing, for heads that do not exist, if a stack would be left without a single
    head, for unequal groups, and for models whose attention cannot run with other head counts in each layer.
    """
    check_finished(model, "prune_heads")
    parts = cuttable(model)
    keep = {number: _kept_heads(parts, number, gone) for number, gone in heads.items()}
    keep = {number: kept for number, kept in keep.items() if len(kept) < parts.attentions[number].num_heads}
    if not keep:
        return model
    with Transaction(model) as transaction:
        cut_heads(transaction, parts, keep)
        num_heads = {parts.attentions[number].name: len(kept) for number, kept in keep.items()}
        for stack in parts.stacks:
            assign_slots(transaction, stack.layers, getattr(model.config, "layer_types", None), num_heads)
    return model


def cut_heads(transaction: Transaction, parts: Anatomy, keep: Mapping[int, list[int]]) -> None:
    """Keep these heads of each attention, later; the slots of the cache are the caller's to number.

    Raises ValueError for models whose attention cannot run with other head counts in each layer.
    """
    names = module_names(transaction.model)
    for number, kept in keep.items():
        attention = parts.attentions[number]
        if (obstacle := head_obstacle(attention, names)) is not None:
            raise ValueError(obstacle)
        if not kept and type(attention.module).__name__ in NEEDS_A_HEAD:
            raise ValueError(f"{attention.name} cannot run without a head: keep one of its {attention.num_heads}.")
        _cut(transaction, attention, kept)
        if not kept and type(attention.module).__name__ in COUNTS_HEADS:
            transaction.replace(attention.name, HeadlessAttention)
        elif (config := config_of_heads(attention.module, len(kept))) is not None:
            transaction.set(attention.module, "config", config)
    keep_position_bias(transaction, parts, keep)


def _kept_heads(parts: Anatomy, number: int, gone: Iterable[int]) -> list[int]:
    if not isinstance(number, int) or not 0 <= number < len(parts.attentions):
        raise ValueError(f"Attention {number!r} does not exist: the model has 0 to {len(parts.attentions) - 1}.")
    attention, gone = parts.attentions[number], set(gone)
    unknown = sorted(gone - set(range(attention.num_heads)))
    if unknown:
        raise ValueError(
            f"Heads {unknown} of attention {number} ({attention.name}) do not exist: it has {attention.num_heads}, "
            "counted from 0 (a model that was pruned before counts the heads it has left)."
        )
    kept = [head for head in range(attention.num_heads) if head not in gone]
    group = attention.num_heads // max(attention.num_key_value_heads, 1)
    sizes = [sum(head // group == g for head in kept) for g in range(attention.num_key_value_heads)]
    if len({size for size in sizes if size}) > 1:
        raise ValueError(
            f"Attention {number} ({attention.name}) has {group} heads to each key and value; the groups that stay must "
            f"keep equally many heads, but would keep {sizes}. Remove as many from each group, or whole groups."
        )
    return kept


def head_obstacle(attention: Attention, names: Mapping[nn.Module, str]) -> str | None:
    """Why heads of this attention cannot be cut, as a sentence; None if they can. `names` are those of all modules."""
    if attention.is_fused and attention.row_order is None:
        return (
            f"{attention.name} holds query, key and value in one {names[attention.query].rpartition('.')[2]!r}, whose "
            f"order of rows is not known (known are {', '.join(ROW_ORDERS)}): the heads cannot be cut."
        )
    if has_unknown_bias(attention, names.values()):
        return (
            f"{attention.name}, a {type(attention.module).__name__}, adds a position bias per head that layers share: "
            f"how it takes its part of it is known only for {', '.join(BIASED)}."
        )
    is_by_width = type(attention.module).__name__ in BY_WIDTH
    if is_by_width or any(names[projection].endswith("_global") for projection in attention.positional):
        return (
            f"{attention.name} puts its heads together by the width of the model (as in Longformer): it cannot run "
            "with fewer in one layer."
        )
    known = {attention.query, attention.key, attention.value, attention.output, *attention.positional}
    for name, parameter in attention.module.named_parameters():
        owner = attention.module.get_submodule(name.rpartition(".")[0])
        is_known = owner in known or name in (*attention.head_biases, f"{BIAS_TABLE}.weight")
        is_known |= name.startswith("LayerNorm.")  # ALBERT's, of what the output makes
        # norms of one head's width serve all heads alike; anything else may belong to heads in a way we cannot see
        if not is_known and parameter.shape != (attention.head_dim,):
            return (
                f"{attention.name}.{name}, of shape {tuple(parameter.shape)}, is no projection and no norm of one head "
                f"(size {attention.head_dim}): which part of it belongs to which head is not known."
            )
    return None


def _cut(transaction: Transaction, attention: Attention, kept: list[int]) -> None:
    head_dim, group = attention.head_dim, attention.num_heads // attention.num_key_value_heads
    groups = sorted({head // group for head in kept})
    queries, pairs = _rows(kept, head_dim), _rows(groups, head_dim)
    if attention.is_fused:
        transaction.select(attention.query, rows=_rows(attention.blocks(kept, groups), head_dim))
    else:
        transaction.select(attention.query, rows=queries)
        transaction.select(attention.key, rows=pairs)
        transaction.select(attention.value, rows=pairs)
    for projection in attention.positional:
        transaction.select(projection, rows=queries)
    for name in attention.head_biases:
        bias = attention.module._parameters[name]
        transaction.set(attention.module, name, nn.Parameter(bias.detach()[queries].clone(), bias.requires_grad))
    transaction.select(attention.output, columns=queries)
    for name, value in head_attributes(len(kept), len(groups), head_dim).items():
        if hasattr(attention.module, name):
            transaction.set(attention.module, name, value)


def head_attributes(num_heads: int, num_key_value_heads: int, head_dim: int) -> dict[str, int | list[int]]:
    """What the attention modules of all families call their own numbers, with the values for these heads."""
    width = num_heads * head_dim
    attributes = {
        "num_attention_heads": num_heads,
        "num_heads": num_heads,
        "n_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_kv_heads": num_key_value_heads,
        "all_head_size": width,
        "split_size": width or [0, 0, 0],  # `Tensor.split(0)` would give one part instead of three
    }
    if num_heads:
        attributes["num_key_value_groups"] = num_heads // num_key_value_heads
    return attributes


def _rows(heads: Iterable[int], head_dim: int) -> list[int]:
    return [head * head_dim + i for head in heads for i in range(head_dim)]
