"""Which blocks stay, against a slow sort in float64."""

import pytest
import torch

from hf_compress.pruning.selection import grow_steepest, keep_above, keep_largest


def slow_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """(n,) -> (n,): sort, and drop from the lowest until enough are gone."""
    order = sorted(range(len(scores)), key=lambda i: (scores.double()[i].item(), i))
    mask = torch.ones(len(scores), dtype=torch.bool)
    for i in order[: int(sparsity * len(scores) + 1e-6)]:
        mask[i] = False
    return mask


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(6, 8, generator=generator), torch.rand(4, 12, generator=generator) * 3]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.99])
def test_scopes_match_a_slow_sort(scores, sparsity):
    blind = keep_largest(scores, sparsity)
    flat = slow_mask(torch.cat([s.flatten() for s in scores]), sparsity)
    assert torch.equal(torch.cat([m.flatten() for m in blind]), flat)
    for score, mask in zip(scores, keep_largest(scores, sparsity, scope="class-uniform"), strict=True):
        assert torch.equal(mask.flatten(), slow_mask(score.flatten(), sparsity))
    for score, mask in zip(scores, keep_largest(scores, sparsity, scope="row"), strict=True):
        assert torch.equal(mask, torch.stack([slow_mask(row, sparsity) for row in score]))
    for score, mask in zip(scores, keep_largest(scores, sparsity, scope="bank", bank_size=4), strict=True):
        banks = score.reshape(-1, 4)
        assert torch.equal(mask.reshape(-1, 4), torch.stack([slow_mask(bank, sparsity) for bank in banks]))


def test_two_of_four_keeps_two_of_each_four(scores):
    for mask in keep_largest(scores, 0.5, scope="bank", bank_size=4):
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_equal_scores_still_give_the_exact_number():
    (mask,) = keep_largest([torch.zeros(10, 10)], 0.37)
    assert int((~mask).sum()) == 37
    (mask,) = keep_largest([torch.ones(1, 10)], 0.7)
    assert int((~mask).sum()) == 7, "0.7 * 10 is below 7 in floating point"


def test_a_threshold_never_takes_a_whole_matrix(scores):
    low, high = keep_above(scores, [0.5, 100.0])
    assert torch.equal(low, scores[0] >= 0.5)
    assert int(high.sum()) == 1 and bool(high.flatten()[scores[1].argmax()])


@pytest.mark.parametrize("scope", ["class-blind", "class-uniform", "row"])
def test_the_steepest_of_those_held_back_grow(scope):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(4, 10, generator=generator) for _ in range(2)]
    slopes = [torch.randn(4, 10, generator=generator) for _ in range(2)]
    masks = keep_largest(scores, 0.7, scope=scope)
    grown = grow_steepest(masks, slopes, 0.2, scope=scope)
    flat = [torch.cat([t.flatten() for t in ts]) for ts in (masks, grown, slopes)]
    classes = {"class-blind": [range(80)], "class-uniform": [range(40), range(40, 80)],
               "row": [range(10 * i, 10 * i + 10) for i in range(8)]}[scope]  # fmt: skip
    for places in classes:
        held_back = [i for i in places if not flat[0][i]]
        steepest = sorted(held_back, key=lambda i: -abs(float(flat[2][i])))[: round(0.2 * len(places))]
        assert {i for i in places if flat[1][i]} == {i for i in places if flat[0][i]} | set(steepest)
