"""Ends a training: what it left open in a model (masks, gates, fake-quantized weights) becomes what is deployed.

Order-free, because no piece acts on another: all settle what hooks add into the weights; what is silent is decided on
the weights; everything is cut at once, quantizers along with the weights they belong to; each weight is stored once.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.model.anatomy import Anatomy, anatomy
from hf_compress.model.classes import ModelT
from hf_compress.model.unfinished import PIECES, forget_reminder, forms_of, pieces_of
from hf_compress.surgery.cache import assign_slots
from hf_compress.surgery.heads import cut_heads
from hf_compress.surgery.layers import cut_layers
from hf_compress.surgery.neurons import cut_neurons
from hf_compress.surgery.silent import silent_parts
from hf_compress.surgery.transaction import Transaction
from hf_compress.training.pieces import Form, Piece
from hf_compress.training.shards import make_whole, put_away
from hf_compress.training.stored import store

logger = logging.getLogger(__name__)


@torch.no_grad()
def finish(model: ModelT) -> ModelT:
    """Turn a trained model into the one that is deployed, in place, and return it. Its logits are those of eval mode.

    Heads and neurons that pruning left without effect are cut, layers that were to go are taken out, weights that were
    fake-quantized are packed with the grids they were trained with, empty blocks are not stored. It does not matter in
    which order these came to the model, or which `Trainer` trained it. Optimizers of the model are void afterwards. A
    model that has nothing to finish is returned unchanged.

    A model that FSDP2 has cut over the ranks is whole on each of them afterwards, so all have to call this. Weights
    that are packed are gathered one by one; where heads, neurons, layers or blocks go, each rank gathers all first.

    A map that training never reached, as Longformer's `query_global` where no token is global, is stored without a
    range of inputs; a warning names it.

    Raises ValueError, and leaves the model in its training form, where a part cannot be stored: an activation range
    that has seen no batch yet, say.
    """
    pieces, forms = pieces_of(model), forms_of(model)
    if not pieces and not forms:
        return model
    _check_forms(model, forms)
    put_away(model)
    for piece in pieces:
        piece.settle()
    are_cut = any(piece.cuts_silent or piece.block_size or piece.removed_layers(model) for piece in pieces)
    make_whole(model, later=() if are_cut else forms)
    for module, form in forms.items():
        form.take_off(module)
    try:
        if pieces:
            _cut(model, pieces, forms)
        store(model, forms, block_size=min((p.block_size for p in pieces if p.block_size), default=None))
    except BaseException:
        for module, form in forms.items():
            form.put_on(module)
        raise
    for piece in pieces:
        piece.cut(model)
        piece.close()
    if pieces:
        delattr(model, PIECES)
    forget_reminder(model)
    return model


def _check_forms(model: nn.Module, forms: Mapping[nn.Module, Form]) -> None:
    """Raise ValueError for what cannot be stored yet; name what training passed by while it ran through the rest."""
    names = {module: name for name, module in model.named_modules()}
    is_trained = any(form.is_idle is False for form in forms.values())
    idle = [module for module, form in forms.items() if is_trained and form.is_idle]
    for module, form in forms.items():
        if module not in idle:
            form.check(names[module])
    if idle:
        logger.warning(
            "No input reached %s in training (%d such maps): their weights are packed, their inputs stay as they are.",
            names[idle[0]], len(idle),
        )  # fmt: skip


def _cut(model: PreTrainedModel, pieces: Sequence[Piece], forms: Mapping[nn.Module, Form]) -> None:
    """Cut heads, neurons and layers, and what belongs to their weights, in one transaction."""
    removed = set().union(*(piece.removed_layers(model) for piece in pieces))
    if not removed and not any(piece.cuts_silent for piece in pieces):
        return  # of a model that is only quantized nothing has to be known: ALBERT, XLM
    parts = anatomy(model)
    stays = [i for i in range(len(parts.layers)) if i not in removed]
    heads, neurons = _silent(model, parts, pieces, forms, stays) if any(p.cuts_silent for p in pieces) else ({}, {})
    if not (heads or neurons or removed):
        return
    with Transaction(model, forms) as transaction:
        keep = {n: _rest(parts.attentions[n].num_heads, gone) for n, gone in heads.items()}
        if keep:  # there may be no attention: FNet
            cut_heads(transaction, parts, keep)
        for number, gone in neurons.items():
            layer = parts.layers[number]
            cut_neurons(transaction, layer, _rest(layer.feed_forward.num_neurons, gone))
        num_heads = {parts.attentions[number].name: len(kept) for number, kept in keep.items()}
        if removed:
            cut_layers(transaction, parts, stays, num_heads)
        else:
            for stack in parts.stacks:
                assign_slots(transaction, stack.layers, getattr(model.config, "layer_types", None), num_heads)


def _silent(model: PreTrainedModel, parts: Anatomy, pieces: Sequence[Piece], forms: Mapping[nn.Module, Form],
            stays: list[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:  # fmt: skip
    """The heads and neurons that go. Pieces that name none of them cut single ones; groups of columns stay whole."""

    def unit(kind: str):
        size = min((piece.units[kind] for piece in pieces if kind in piece.units), default=1)
        return lambda output: math.lcm(size, forms[output].column_unit if output in forms else 1)

    return silent_parts(
        model, parts, head_unit=unit("heads"), neuron_unit=unit("neurons"), layers=stays,
        is_heard=lambda output: output in forms and forms[output].hears_all,
    )  # fmt: skip


def _rest(number: int, gone: Sequence[int]) -> list[int]:
    return sorted(set(range(number)) - set(gone))
