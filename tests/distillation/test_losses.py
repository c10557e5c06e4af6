"""Each loss against its equation, written out slowly in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.distillation.losses.sums import (
    attention_loss,
    binary_soft_loss,
    hidden_state_loss,
    logit_loss,
    noisy_teacher,
    soft_loss,
)


def softmax(row):
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / sum(exps) for e in exps]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_its_equation(temperature):
    student, teacher = random(5, 3), random(5, 3, seed=1)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = softmax([x / temperature for x in t])
        q = softmax([x / temperature for x in s])
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_soft_loss_is_zero_for_equal_logits():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    assert soft_loss(logits, logits, temperature=4.0).item() == pytest.approx(0.0, abs=1e-6)


def test_soft_loss_gradient_at_high_temperature_is_that_of_centred_logits():
    """Hinton et al., section 2.1: for a high temperature, dL/dz = (z_s - z_t) / N with both centred."""
    student, teacher = random(1, 4).requires_grad_(), random(1, 4, seed=1)
    soft_loss(student, teacher, temperature=1e6).backward()
    centred = (student - student.mean()) - (teacher - teacher.mean())
    torch.testing.assert_close(student.grad, centred.detach() / 4, rtol=1e-3, atol=1e-6)


def test_binary_soft_loss_is_its_equation():
    student, teacher = random(4, 3), random(4, 3, seed=1)
    expected = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-t / 2)), 1 / (1 + math.exp(-s / 2))
        expected += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 3
    assert binary_soft_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-12)


def test_logit_loss_is_its_equation():
    student, teacher = random(4, 3), random(4, 3, seed=1)
    expected = (
        sum((s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)) / 3
    )
    assert logit_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_hidden_state_loss_is_its_equation():
    student, teacher = random(2, 3, 4), random(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    expected = 0.0
    for b, t in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        expected += sum((student[b, t, d] - teacher[b, t, d]).item() ** 2 for d in range(4)) / 4
    assert hidden_state_loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-12)


def test_attention_loss_is_its_equation():
    B, H, T = 2, 2, 3
    student, teacher = random(B, H, T, T), random(B, H, T, T, seed=1)
    causal = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    real = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    allowed = (causal & real[:, None, :] & real[:, :, None])[:, None]
    expected = 0.0
    for b in range(B):
        for q in range(T):
            keys = [k for k in range(T) if allowed[b, 0, q, k]]
            for h in range(H):
                expected += sum((student[b, h, q, k] - teacher[b, h, q, k]).item() ** 2 / (H * len(keys)) for k in keys)
    assert attention_loss(student, teacher, allowed, real).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_padding_never_matters(seed, length):
    """Whatever stands at masked positions, the loss is the same."""
    student, teacher = random(2, 6, 4, seed=seed), random(2, 6, 4, seed=seed + 1)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, :length] = True
    scores = random(2, 3, 6, 6, seed=seed), random(2, 3, 6, 6, seed=seed + 1)
    allowed = (mask[:, None, :] & mask[:, :, None])[:, None]
    hidden, attention = hidden_state_loss(student, teacher, mask), attention_loss(*scores, allowed, mask)
    student = student.masked_fill(~mask[..., None], 1e6)
    scores = scores[0].masked_fill(~allowed, 1e6), scores[1]
    torch.testing.assert_close(hidden_state_loss(student, teacher, mask), hidden, rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_loss(*scores, allowed, mask), attention, rtol=1e-12, atol=0)


def test_losses_of_half_precision_are_summed_in_float32():
    student, teacher = random(64, 3).bfloat16(), random(64, 3, seed=1).bfloat16()
    assert soft_loss(student, teacher, 1.0).dtype == torch.float32
    expected = soft_loss(student.double(), teacher.double(), 1.0)
    assert soft_loss(student, teacher, 1.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_noise_disturbs_a_share_of_the_examples_by_its_form():
    torch.manual_seed(0)
    logits = torch.full((4000, 2), 3.0)
    relative = noisy_teacher(logits, sigma=0.1, share=0.25)
    changed = (relative != logits).any(dim=1)
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (relative[changed] / 3 - 1).std().item() == pytest.approx(0.1, rel=0.1)
    additive = noisy_teacher(logits, sigma=0.1, share=1.0, form="additive")
    assert (additive - 3).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("form", ["relative", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_gives_no_probability_to_what_has_none(form, dtype):
    """Padding of a span (-1e4), classes that a cache lacks (-1e30): 1 + noise is below 0 for 16% of them."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 2.0, -1e4, -1e30]], dtype=dtype).repeat(4000, 1)
    noisy = noisy_teacher(logits, sigma=1.0, share=1.0, form=form)
    assert torch.equal(noisy[:, 2:], logits[:, 2:])
    assert (noisy[:, :2] != logits[:, :2]).any(dim=1).all()
