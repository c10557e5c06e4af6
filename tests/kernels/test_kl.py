"""The distillation losses against float64 softmax, and against the same loss on logits that were kept."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_compress_kernels import kl_from_logits
from hf_compress_kernels.dispatch import INTERPRET

from tests.kernels.oracle import on, plain_only, relative_error


def slow_kl(student, teacher, temperature):
    """T^2 * sum p_t (log p_t - log p_s) of each row, float64."""
    log_s, log_t = (F.log_softmax(logits.double() / temperature, dim=-1) for logits in (student, teacher))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)


def logits(*shape, seed=0, dtype=torch.float32, scale=4.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("V", [2, 37, 1000, 4099], ids="V={}".format)
@pytest.mark.parametrize("temperature", [1.0, 2.5], ids="T={}".format)
def test_loss_and_gradient_equal_float64(V, temperature, device):
    student, teacher = logits(5, V, seed=1).to(device).requires_grad_(), logits(5, V, seed=2).to(device)
    loss = kl_from_logits(student, teacher, temperature=temperature)
    weights = torch.linspace(0.5, 2.0, 5, device=device)
    (loss * weights).sum().backward()
    double = student.detach().double().requires_grad_()
    expected = slow_kl(double, teacher, temperature)
    (expected * weights).sum().backward()
    assert relative_error(loss, expected.detach()) < 1e-6
    assert relative_error(student.grad, double.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_logits_lose_only_the_cast_of_the_gradient(dtype, device):
    student, teacher = on(device, (logits(4, 300, seed=1, dtype=dtype), logits(4, 300, seed=2, dtype=dtype)))
    student.requires_grad_()
    loss = kl_from_logits(student, teacher, temperature=2.0)
    loss.sum().backward()
    double = student.detach().double().requires_grad_()
    expected = slow_kl(double, teacher, 2.0)
    expected.sum().backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected.detach()) < 1e-6
    assert relative_error(student.grad, double.grad) < {torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]


def test_equal_logits_give_zero_and_shifting_them_changes_nothing():
    student, teacher = logits(3, 50, seed=1), logits(3, 50, seed=2)
    torch.testing.assert_close(kl_from_logits(student, student), torch.zeros(3), atol=2e-6, rtol=0)
    torch.testing.assert_close(kl_from_logits(student + 7, teacher - 3), kl_from_logits(student, teacher))


def test_masked_rows_count_nothing_whatever_they_hold():
    student, teacher = logits(2, 3, 40, seed=1), logits(2, 3, 40, seed=2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    student[0, 1], teacher[1, 0] = float("nan"), float("inf")
    student.requires_grad_()
    loss = kl_from_logits(student, teacher, mask, temperature=2.0)
    loss.sum().backward()
    assert loss[~mask].eq(0).all()
    assert student.grad[~mask].eq(0).all()
    assert relative_error(loss[mask].detach(), slow_kl(student.detach()[mask], teacher[mask], 2.0)) < 1e-6


@pytest.fixture
def _maxima_as_on_a_device(monkeypatch):
    """In the interpreter the larger of NaN and a number is NaN; on a GPU it is the number."""
    if INTERPRET:
        from triton.runtime.interpreter import InterpreterBuilder

        larger = lambda self, one, other: self.binary_op(one, other, np.fmax)  # noqa: E731
        monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", larger)


@pytest.mark.usefixtures("_maxima_as_on_a_device")
@pytest.mark.parametrize("place", ["student", "teacher"])
@pytest.mark.parametrize("at", [0, 17, 2049], ids="column-{}".format)
def test_not_a_number_stays_one(place, at, device):
    """A maximum that takes the number of the two would lose it, and the training would go on."""
    pair = {"student": logits(3, 2100, seed=1), "teacher": logits(3, 2100, seed=2)}
    pair[place][1, at] = float("nan")
    student, teacher = (pair[name].to(device) for name in ("student", "teacher"))
    student.requires_grad_()
    loss = kl_from_logits(student, teacher)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert student.grad.isnan().any(1).tolist() == [False, True, False]


def test_a_strided_mask_keeps_its_own_rows():
    student, teacher = logits(6, 40, seed=1), logits(6, 40, seed=2)
    mask = torch.tensor([[True, False], [False, True], [True, False], [True, False], [False, True], [True, True]])[:, 0]
    grads = []
    for one in (mask, mask.contiguous()):
        leaf = student.clone().requires_grad_()
        loss = kl_from_logits(leaf, teacher, one)
        loss.sum().backward()
        assert torch.equal(loss != 0, mask) and torch.equal(leaf.grad.abs().sum(1) > 0, mask)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_large_and_missing_logits_stay_finite():
    student = torch.tensor([[9e4, -9e4, 0.0, float("-inf")]], requires_grad=True)
    teacher = torch.tensor([[9e4, 8e4, 0.0, float("-inf")]])
    loss = kl_from_logits(student, teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(student.grad).all()


@plain_only
def test_gradcheck():
    student = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: kl_from_logits(s, teacher, temperature=2.0), (student,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_from_logits(torch.ones(2, 3), torch.ones(2, 4)), "one shape"),
        (lambda: kl_from_logits(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3).bool()), r"mask must be bool \(2,\)"),
        (lambda: kl_from_logits(torch.ones(2, 3), torch.ones(2, 3), temperature=0.0), "positive number"),
    ],
    ids=["shape", "mask", "temperature"],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_teacher_has_no_gradient():
    with pytest.raises(NotImplementedError, match="Detach"):
        kl_from_logits(torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True))
