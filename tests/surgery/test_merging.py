"""Merging equal neurons changes nothing, and otherwise goes pair by pair as the paper's three steps say."""

import pytest
import torch
from helpers import tiny_model
from silence import logits
from torch import Tensor

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.surgery.merging import merge


def step_by_step(W: Tensor, a: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Eq. 14 and 15 of the survey (Srinivas and Babu), every pair looked at again in every step."""
    a, left = a.clone(), list(range(a.shape[1]))
    for _ in range(count):
        pairs = [
            (float((a[:, j] ** 2).mean() * ((W[i] - W[j]) ** 2).sum()), j, i) for i in left for j in left if i != j
        ]
        _, j, i = min(pairs)
        a[:, i] += a[:, j]
        left.remove(j)
    return a[:, left], left


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_merging_follows_the_paper(count):
    generator = torch.Generator().manual_seed(count)
    W = torch.randn(10, 4, dtype=torch.float64, generator=generator)
    a = torch.randn(3, 10, dtype=torch.float64, generator=generator)
    expected, left = step_by_step(W, a, count)
    merged, kept = merge(W, a, count)
    assert kept == left
    torch.testing.assert_close(merged[:, kept], expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_equal_neurons_merge_without_a_trace(family):
    model = tiny_model(family).double()
    part = anatomy(model).layers[1].feed_forward
    width = part.num_neurons
    for module in part.inputs:
        rows = module.weight.data.T if family == "gpt2" else module.weight.data
        for first in range(0, rows.shape[0], width):  # fused: value and gate
            rows[first + 3], rows[first + 8] = rows[first + 5], rows[first + 6]
        if module.bias is not None:
            module.bias.data[[3, 8]] = module.bias.data[[5, 6]]
    before = logits(model)
    assert hfc.merge_neurons(model, {1: 2}) is model
    assert anatomy(model).layers[1].feed_forward.num_neurons == width - 2
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts, message", [({4: 1}, "Layer 4 does not exist"), ({0: 48}, "0 to 47 can go"),
                                             ({0: -1}, "0 to 47 can go")], ids=str)  # fmt: skip
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        hfc.merge_neurons(tiny_model("bert"), counts)
