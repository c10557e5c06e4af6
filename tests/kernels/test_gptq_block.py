"""The GPTQ inner loop against the algorithm written out entry by entry in float64, on exactly representable numbers."""

import pytest
import torch
from hf_compress_kernels import gptq_quantize_block


def slow_block(weight, hinv, scale, zero, maxq):
    """Algorithm 1 of the paper for one block, one weight at a time."""
    W = weight.double().clone()
    N, B = W.shape
    q, err = torch.zeros(N, B, dtype=torch.uint8), torch.zeros(N, B, dtype=torch.float64)
    for n in range(N):
        for i in range(B):
            g = i * scale.shape[1] // B
            s, z = scale[n, g].double(), zero[n, g].double()
            q_i = min(max(torch.round(W[n, i] / s) + z, torch.tensor(0.0)), torch.tensor(float(maxq)))
            q[n, i] = int(q_i)
            err[n, i] = (W[n, i] - s * (q_i - z)) / hinv[i, i].double()
            W[n, i:] -= err[n, i] * hinv[i, i:].double()
    return q, err


def block(N, B, G, seed=0):
    """Values on coarse binary grids, so that float32 makes no rounding that float64 does not."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-64, 65, (N, B), generator=generator) / 32.0
    hinv = torch.triu(torch.randint(-2, 3, (B, B), generator=generator) / 64.0, diagonal=1) + torch.eye(B)
    scale = 2.0 ** torch.randint(-3, 0, (N, G), generator=generator)
    zero = torch.randint(0, 16, (N, G), generator=generator).float()
    return weight, hinv, scale, zero


@pytest.mark.parametrize(
    ("N", "B", "G"), [(5, 16, 1), (19, 32, 2), (3, 16, 16)], ids=["one-group", "groups", "columns"]
)
def test_integers_and_errors_equal_the_algorithm(N, B, G):
    weight, hinv, scale, zero = block(N, B, G)
    before = weight.clone()
    q, err = gptq_quantize_block(weight, hinv, scale, zero, 15)
    expected_q, expected_err = slow_block(weight, hinv, scale, zero, 15)
    assert torch.equal(q, expected_q)
    torch.testing.assert_close(err.double(), expected_err, rtol=0, atol=1e-6)
    assert torch.equal(weight, before)


def test_ties_round_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5] * 4])
    q, _ = gptq_quantize_block(weight, torch.eye(16), torch.ones(1, 1), torch.full((1, 1), 8.0), 15)
    assert q[0, :4].tolist() == [8, 10, 10, 8]


def test_an_independent_hessian_gives_plain_rounding():
    weight, _, scale, zero = block(4, 16, 1)
    q, _ = gptq_quantize_block(weight, torch.eye(16) * 0.5, scale, zero, 15)
    assert torch.equal(q, (torch.round(weight / scale) + zero).clamp(0, 15).to(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hinv=torch.eye(8)), "hinv must be square"),
        (dict(scale=torch.ones(4, 3)), "groups dividing 16"),
        (dict(weight=torch.zeros(4, 16, dtype=torch.float16)), "weight must be torch.float32"),
        (dict(maxq=256), "maxq must lie in"),
    ],
    ids=["hinv", "scale", "dtype", "maxq"],
)
def test_bad_values_are_refused(changes, message):
    args = dict(zip(("weight", "hinv", "scale", "zero"), block(4, 16, 1), strict=True), maxq=15)
    with pytest.raises(ValueError, match=message):
        gptq_quantize_block(**{**args, **changes})
