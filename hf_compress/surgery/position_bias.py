"""Position biases with a row for each head that several layers share, and attentions that have some of these heads.

MPNet, Bloom and Falcon make the bias once and hand it to every layer: a layer takes the rows of its own heads out of
it. In T5 the first layer makes it and each hands it on: once a head goes, every layer of the stack makes its own, from
its own part of the table.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.model.anatomy import Anatomy, Attention, Stack, anatomy
from hf_compress.model.classes import made_class, plain_class
from hf_compress.surgery.stand_ins import BIAS_TABLE
from hf_compress.surgery.transaction import Transaction

HANDED = {"position_bias", "relative_position_bias", "alibi"}  # to the `forward` of an attention
KEPT = "kept_heads"  # of an attention: which heads of the bias it has, counted as the first model did


class MPNetHeads:
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                position_bias: Tensor | None = None, *args: Any, **kwargs: Any):  # fmt: skip
        if position_bias is not None:
            position_bias = own_rows(position_bias, self.kept_heads)
        return super().forward(hidden_states, attention_mask, position_bias, *args, **kwargs)


class BloomHeads:
    def forward(self, hidden_states: Tensor, residual: Tensor, *, alibi: Tensor, **kwargs: Any):
        if not self.num_heads:
            added = F.dropout(self.dense(hidden_states[..., :0]), self.hidden_dropout, self.training)
            return residual + added, None
        alibi = own_rows(alibi.unflatten(0, (len(hidden_states), -1)), self.kept_heads).flatten(0, 1)
        return super().forward(hidden_states, residual, alibi=alibi, **kwargs)


class FalconHeads:
    def forward(self, hidden_states: Tensor, *, alibi: Tensor | None, attention_mask: Tensor | None, **kwargs: Any):
        if not self.num_heads:
            return self.dense(hidden_states[..., :0]), None
        if alibi is not None:
            alibi = own_rows(alibi.view(len(hidden_states), -1, *alibi.shape[-2:]), self.kept_heads)  # (B, H, 1, S)
            if attention_mask is not None and attention_mask.shape[1] > 1:  # the bias is in it already
                attention_mask = own_rows(attention_mask, self.kept_heads)
        return super().forward(hidden_states, alibi=alibi, attention_mask=attention_mask, **kwargs)


class T5Heads:
    """Makes its own bias, whatever it is handed; of a cross-attention that is zero."""

    def forward(self, hidden_states: Tensor, *args: Any, position_bias: Tensor | None = None, **kwargs: Any):
        return super().forward(hidden_states, *args, position_bias=None, **kwargs)


BIASED: dict[str, type] = {
    "MPNetSelfAttention": MPNetHeads,
    "BloomAttention": BloomHeads,
    "FalconAttention": FalconHeads,
    "FalconFlashAttention2": FalconHeads,
    "T5Attention": T5Heads,
    "MT5Attention": T5Heads,
}


def own_rows(bias: Tensor, heads: Sequence[int]) -> Tensor:
    """(B, H, ...) -> (B, len(heads), ...). By slices: a list as index would be copied to the GPU in each call."""
    return torch.cat([bias[:, head : head + 1] for head in heads], dim=1) if heads else bias[:, :0]


def _some_heads(module: nn.Module) -> type:
    return made_class(f"SomeHeads{type(module).__name__}", bias_class(module), type(module))


def has_unknown_bias(attention: Attention, names: Collection[str]) -> bool:
    """Whether heads have a position bias that is not theirs alone, in a way not known here. `names`: of all modules."""
    if bias_class(attention.module) is not None:
        return False
    given = inspect.signature(type(attention.module).forward).parameters
    has_table = any(name.rpartition(".")[2] == BIAS_TABLE for name in names)
    return has_table or not HANDED.isdisjoint(given) or hasattr(attention.module, "has_relative_attention_bias")


def bias_class(module: nn.Module) -> type | None:
    """What makes of this attention one that has some of the heads of a shared bias; None where none is shared."""
    return BIASED.get(plain_class(module).__name__)


def kept_heads(attention: Attention) -> list[int]:
    """The heads that this attention has, counted as the first model did."""
    return list(getattr(attention.module, KEPT, range(attention.num_heads)))


def keep_position_bias(transaction: Transaction, parts: Anatomy, keep: Mapping[int, list[int]]) -> None:
    """Later, each attention of `keep` uses the bias of the heads that it keeps."""
    numbers = {attention.name: number for number, attention in enumerate(parts.attentions)}
    for stack in parts.stacks:
        attentions = [attention for layer in stack.layers for attention in layer.attentions]
        is_handed_on = any(bias_class(attention.module) is T5Heads for attention in attentions)
        changed = [a for a in attentions if bias_class(a.module) and numbers[a.name] in keep]
        for attention in attentions if changed and is_handed_on else changed:
            kept = keep.get(numbers[attention.name], list(range(attention.num_heads)))
            _keep(transaction, attention, kept, bias_table(stack, attention) if is_handed_on else None)


def bias_table(stack: Stack, attention: Attention) -> nn.Embedding | None:
    """The table of this attention's position bias, its own or that of the first layer; cross-attentions have none."""
    own = getattr(attention.module, BIAS_TABLE, None)
    if own is not None or attention.is_cross:
        return own
    return getattr(stack.layers[0].attention.module, BIAS_TABLE)


def first_may_go(stack: Stack) -> bool:
    """Whether another layer can take the place of the first one: not where that alone has the bias, unknown how."""
    firsts = [attention.module for layer in stack.layers[:2] for attention in layer.attentions[:1]]
    has_bias = [getattr(module, "has_relative_attention_bias", False) for module in firsts]
    return len(set(has_bias)) < 2 or bias_class(firsts[0]) is T5Heads


def move_position_bias(transaction: Transaction, stack: Stack, first: int, num_heads: Mapping[str, int]) -> None:
    """Later, layer `first` of the stack makes the bias of all layers, if its first one does now (as in T5).

    `num_heads` names the attentions of which heads go with the same cut: then each layer has its own.
    """
    attentions = [attention for layer in stack.layers for attention in layer.attentions]
    table = getattr(attentions[0].module, BIAS_TABLE, None) if attentions else None
    is_shared = table is not None and bias_class(attentions[0].module) is T5Heads
    if first and is_shared and not any(hasattr(a.module, KEPT) or a.name in num_heads for a in attentions):
        for attention, mine in ((attentions[0], None), (stack.layers[first].attention, table)):
            transaction.set(attention.module, BIAS_TABLE, mine)
            transaction.set(attention.module, "has_relative_attention_bias", mine is not None)


def _keep(transaction: Transaction, attention: Attention, kept: list[int], table: nn.Embedding | None) -> None:
    module, before = attention.module, kept_heads(attention)
    if plain_class(module) is type(module):
        transaction.set(module, "__class__", _some_heads(module))
    transaction.set(module, KEPT, [before[head] for head in kept])
    if table is not None:
        weight = table.weight.detach()[:, kept].clone()
        own = nn.Embedding(*weight.shape, _weight=weight)
        own.weight.requires_grad_(table.weight.requires_grad)
        transaction.set(module, BIAS_TABLE, own)
        transaction.set(module, "has_relative_attention_bias", True)


def place_kept_heads(model: nn.Module, name: str, heads: list[int]) -> None:
    """Changes the attention `name` of `model`, on the meta device: it has these heads of the bias.

    Raises ValueError if it is none, if it shares no bias, or if the bias has no such heads.
    """
    attention = next((a for layer in anatomy(model).layers for a in layer.attentions if a.name == name), None)
    module = None if attention is None else attention.module
    mixin = None if module is None else bias_class(module)
    if mixin is None or (mixin is not T5Heads and not set(heads) <= set(range(model.config.num_attention_heads))):
        raise ValueError(f"structure: {name!r} has no heads {heads} of a position bias that layers share.")
    module.__class__ = _some_heads(module)
    setattr(module, KEPT, heads)
    if mixin is T5Heads and not attention.is_cross:
        size = module.relative_attention_num_buckets
        own = nn.Embedding(size, len(heads), device="meta", dtype=attention.query.weight.dtype)
        module.relative_attention_bias, module.has_relative_attention_bias = own, True
