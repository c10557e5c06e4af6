"""Fake quantization and its learned-step gradient against the equations, entry by entry."""

import pytest
import torch
from hf_compress_kernels import fake_quant


def slow_fake_quant(x, scale, zero, qmin, qmax, grad):
    """Value, gradient of x, gradient of the scale: the three equations, in float64, one entry at a time."""
    N, K = x.shape
    g = K // scale.shape[1]
    value, grad_x, grad_scale = (
        torch.zeros(N, K).double(),
        torch.zeros(N, K).double(),
        torch.zeros(scale.shape).double(),
    )
    for n in range(N):
        for k in range(K):
            s, z = scale[n, k // g].double(), zero[n, k // g].double()
            step = x[n, k].double() / s
            q = torch.round(step) + z
            clamped = q.clamp(qmin, qmax)
            value[n, k] = s * (clamped - z)
            inside = bool(q == clamped)
            grad_x[n, k] = grad[n, k] if inside else 0
            grad_scale[n, k // g] += grad[n, k] * ((torch.round(step) - step) if inside else clamped - z)
    return value, grad_x, grad_scale


def case(N=5, K=24, groups=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, K, generator=generator) * 2
    scale = torch.rand(N, groups, generator=generator) * 0.3 + 0.1
    zero = torch.randint(0, 16, (N, groups), generator=generator).float()
    return x, scale, zero, torch.randn(N, K, generator=generator)


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 15), (0, 3), (-127, 127)], ids=["4-bit", "2-bit", "signed"])
@pytest.mark.parametrize("groups", [1, 3], ids="{}-groups".format)
def test_value_and_gradients_equal_the_equations(qmin, qmax, groups):
    x, scale, zero, grad = case(groups=groups)
    zero = zero * 0 if qmin < 0 else zero.clamp(max=qmax)
    expected = slow_fake_quant(x, scale, zero, qmin, qmax, grad)
    x.requires_grad_(), scale.requires_grad_()
    value = fake_quant(x, scale, zero, qmin, qmax, 24 // groups)
    value.backward(grad)
    for actual, wanted in zip((value, x.grad, scale.grad), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_rounded_once(dtype):
    x, scale, zero, grad = case()
    x, scale = x.to(dtype), scale.to(dtype)
    value, _, _ = slow_fake_quant(x, scale, zero, 0, 15, grad)
    assert torch.equal(fake_quant(x, scale, zero, 0, 15, 8), value.to(dtype))


def test_values_on_the_grid_stay():
    scale, zero = torch.full((2, 1), 0.25), torch.full((2, 1), 3.0)
    on_grid = (torch.randint(0, 16, (2, 10)) - 3.0) * 0.25
    assert torch.equal(fake_quant(on_grid, scale, zero, 0, 15), on_grid)


def test_transposed_input():
    x, scale, zero, _ = case()
    assert torch.equal(fake_quant(x.t().contiguous().t(), scale, zero, 0, 15, 8), fake_quant(x, scale, zero, 0, 15, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.ones(24)), "matrix"),
        (dict(group_size=7), "group_size must divide"),
        (dict(scale=torch.ones(5, 2)), r"scale and zero must be \(5, 3\)"),
        (dict(qmin=15), "qmin must be less"),
    ],
    ids=["x", "group", "scale", "range"],
)
def test_bad_values_are_refused(changes, message):
    x, scale, zero, _ = case()
    with pytest.raises(ValueError, match=message):
        fake_quant(**{**dict(x=x, scale=scale, zero=zero, qmin=0, qmax=15, group_size=8), **changes})
