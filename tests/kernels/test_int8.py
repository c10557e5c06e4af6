"""8-bit linear with quantized activations, and the packed embedding."""

import pytest
import torch
from hf_compress_kernels import w8a8_linear


def quantized_weight(N=24, K=40):
    generator = torch.Generator().manual_seed(0)
    qweight = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    return qweight, torch.rand(N, generator=generator) + 0.1


def test_w8a8_worked_out_by_hand():
    # 2 is the largest of the row: q = (127, 64), scale 2/127; 127 * 3 - 64 * 5 = 61
    y = w8a8_linear(torch.tensor([[2.0, 1.008]]), torch.tensor([[3, -5]], dtype=torch.int8), torch.tensor([0.5]))
    assert y.item() == pytest.approx(61 * (2 / 127) * 0.5)


def test_w8a8_stays_within_the_rounding_of_its_activations(device):
    qweight, scale = quantized_weight()
    x = torch.randn(2, 5, 40)
    weight = qweight.double() * scale.double()[:, None]
    bound = (x.abs().amax(-1, keepdim=True) / 254) * weight.abs().sum(1)  # half a step in every activation
    y = w8a8_linear(x.to(device), qweight.to(device), scale.to(device))
    error = (y.double().cpu() - x.double() @ weight.T).abs()
    assert (error <= bound * 1.001).all()
    assert w8a8_linear(torch.zeros(1, 40), qweight, scale, torch.ones(24)).eq(1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, s: w8a8_linear(torch.ones(1, 8), q, s), "in_features=40"),
        (lambda q, s: w8a8_linear(torch.ones(1, 40), q.float(), s), "int8 matrix"),
        (lambda q, s: w8a8_linear(torch.ones(1, 40), q, s[:3]), r"scale must be \(24,\)"),
    ],
    ids=["x", "weight", "scale"],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*quantized_weight())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_w8a8_keeps_the_dtype_of_its_input(dtype):
    x, qweight = torch.randn(3, 32), torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    y = w8a8_linear(x.to(dtype), qweight, torch.ones(8), torch.ones(8))
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), w8a8_linear(x.to(dtype).float(), qweight, torch.ones(8), torch.ones(8)),
                               rtol=8e-3, atol=1e-3)  # fmt: skip
