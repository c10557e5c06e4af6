"""Redundant neurons, merged: two that always answer alike become one with the sum of their outgoing weights."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_compress.model.anatomy import FeedForward
from hf_compress.model.classes import ModuleT
from hf_compress.model.cuttable import cuttable
from hf_compress.model.unfinished import check_finished
from hf_compress.surgery.neurons import cut_neurons
from hf_compress.surgery.transaction import Transaction


def merge_neurons(model: ModuleT, counts: Mapping[int, int]) -> ModuleT:
    """Merge the most redundant neurons into their likes. Changes `model` and its config, and returns it.

    `counts` maps a layer, its place in `anatomy(model).layers`, to how many of its neurons go. Again and again the pair
    (i, j) goes together whose saliency mean(a_j^2) * |W_i - W_j|^2 is least: j is deleted and a_i becomes a_i + a_j
    (Srinivas and Babu 2015, https://arxiv.org/abs/1507.06149). W_i is all that leads into neuron i, its bias and its
    gate included, a_i all that leads out of it. Merging neurons that are equal changes nothing.
    Raises ValueError, and changes nothing, for layers that do not exist or more neurons than could go.
    """
    check_finished(model, "merge_neurons")
    layers = cuttable(model).layers
    for number, count in counts.items():
        if not isinstance(number, int) or not 0 <= number < len(layers):
            raise ValueError(f"Layer {number!r} does not exist: the model has 0 to {len(layers) - 1}.")
        num_neurons = layers[number].feed_forward.num_neurons
        if not isinstance(count, int) or not 0 <= count < num_neurons:
            raise ValueError(f"Layer {number} has {num_neurons} neurons: 0 to {num_neurons - 1} can go, got {count}.")
    with Transaction(model) as transaction:
        for number, count in counts.items():
            part = layers[number].feed_forward
            outgoing = part.output.weight.detach()
            outgoing = outgoing.T if isinstance(part.output, Conv1D) else outgoing  # (D, F)
            merged, kept = merge(incoming(part), outgoing, count)
            cut_neurons(transaction, layers[number], kept, outgoing=merged)
    return model


def incoming(part: FeedForward) -> Tensor:
    """(F, ...) all that leads into each neuron, side by side: weights and biases of value and gate."""
    columns = []
    for module in part.inputs:
        weight = module.weight.detach()
        columns.append(weight.T if isinstance(module, Conv1D) else weight)
        if module.bias is not None:
            columns.append(module.bias.detach()[:, None])
    if part.is_fused:
        columns = [half for column in columns for half in column.chunk(2)]
    return torch.cat(columns, dim=1)


def merge(W: Tensor, a: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The outgoing weights (D, F) after `count` merges, and the neurons that are left, ascending.

    W (F, K) leads in, a (D, F) leads out. Computed in float32, or float64 for float64.
    """
    compute = torch.promote_types(a.dtype, torch.float32)
    a = a.to(compute).clone()
    distances = torch.cdist(W.to(compute), W.to(compute)).square_()  # (F, F)
    distances.fill_diagonal_(torch.inf)
    nearest, partner = distances.min(dim=0)  # of each j, among those left
    weight = a.square().mean(dim=0)  # mean of a_j^2
    is_left = torch.ones(len(W), dtype=torch.bool, device=W.device)
    for _ in range(count):
        saliency = nearest * weight
        saliency[nearest.isinf()] = torch.inf
        j = int(saliency.argmin())
        i = int(partner[j])
        a[:, i] += a[:, j]
        weight[i] = a[:, i].square().mean()
        is_left[j] = False
        distances[j], distances[:, j], nearest[j] = torch.inf, torch.inf, torch.inf
        for k in (partner == j).nonzero().flatten().tolist():
            nearest[k], partner[k] = distances[:, k].min(dim=0)
    return a, is_left.nonzero().flatten().tolist()
