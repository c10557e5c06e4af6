"""Cuts out what no longer says anything: heads and neurons of which masks have left only zeros."""

import torch
from torch import Tensor, nn

from hf_compress.model.anatomy import Attention, FeedForward, Projection, anatomy
from hf_compress.pruning.importance.neurons import dense_weight
from hf_compress.surgery import prune_heads, prune_neurons


def cut_silent(model: nn.Module) -> nn.Module:
    """Cut out heads and neurons that add nothing to the model's output. Changes `model` and returns it.

    A head is silent when its columns of the output projection are all zeros, or when its values are; a neuron when its
    column of the output projection is, or when it is always zero itself. The logits stay as they are. Heads that share
    a key and value go together or not at all; of an encoder or decoder that has fallen silent altogether one head
    stays. Raises ValueError for models that surgery cannot cut.
    """
    parts = anatomy(model)
    heads = {attention.name: silent_heads(attention) for attention in parts.attentions}
    neurons = [silent_neurons(layer.feed_forward) for layer in parts.layers]
    for stack in parts.stacks:
        attentions = [attention for layer in stack.layers for attention in layer.attentions]
        if all(len(heads[a.name]) == a.num_heads for a in attentions):
            first = next(a for a in attentions if a.num_heads)
            del heads[first.name][: first.num_heads // first.num_key_value_heads]
    if all(len(gone) == layer.feed_forward.num_neurons for gone, layer in zip(neurons, parts.layers, strict=True)):
        next(gone for gone in neurons if gone).pop()
    if any(heads.values()):
        prune_heads(model, {i: heads[a.name] for i, a in enumerate(parts.attentions) if heads[a.name]})
    if any(neurons):
        prune_neurons(model, {i: gone for i, gone in enumerate(neurons) if gone})
    return model


def silent_heads(attention: Attention) -> list[int]:
    if not attention.num_heads:
        return []
    columns = dense_weight(attention.output).unflatten(1, (attention.num_heads, attention.head_dim))  # (D, H, Dh)
    silent = ~columns.bool().any(dim=2).any(dim=0)  # (H,)
    group = attention.num_heads // attention.num_key_value_heads
    if not attention.is_fused:
        silent |= _zero_rows(attention.value).unflatten(0, (-1, attention.head_dim)).all(1).repeat_interleave(group)
    whole_groups = silent.unflatten(0, (-1, group)).all(dim=1).repeat_interleave(group)
    return whole_groups.nonzero().flatten().tolist()


def silent_neurons(part: FeedForward) -> list[int]:
    silent = ~dense_weight(part.output).bool().any(dim=0)  # (F,)
    # act(0) = 0 for gelu, silu and relu; behind a gate it is enough that one factor is zero
    inputs = [_zero_rows(module) for module in part.inputs]
    if part.is_fused:
        inputs = list(inputs[0].chunk(2))
    return (silent | torch.stack(inputs).any(dim=0)).nonzero().flatten().tolist()


def _zero_rows(module: Projection) -> Tensor:
    """(N,) True for outputs that are always zero: all weights zero, and the bias."""
    zero = ~dense_weight(module).bool().any(dim=1)
    return zero if module.bias is None else zero & (module.bias.detach() == 0)
