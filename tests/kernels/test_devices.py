"""A device without a kernel of ours runs the reference of every operator, gradients included."""

import pytest
import torch

from tests.kernels.oracle import plain_only
from tests.kernels.test_compile import NAMESPACE, cases

pytestmark = plain_only
# What devices look themselves up by: an Apple GPU, one of Intel, and any that comes from outside of PyTorch.
KEYS = ("MPS", "XPU", "PrivateUse1")


def as_on(key: str, operator, arguments: tuple):
    """What the kernel of `key` makes of tensors that lie on the CPU."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with torch.no_grad():
        return operator.redispatch(keys, *arguments)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", cases())
def test_every_operator_runs_on_any_device(name, key):
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    with torch.no_grad():
        expected = operator(*cases()[name])
    torch.testing.assert_close(as_on(key, operator, cases()[name]), expected, rtol=0, atol=0)  # the same code
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", f"Autograd{key}")


def test_an_operator_of_one_device_alone_would_be_found():
    @torch.library.custom_op("hfc_tests::of_a_gpu_alone", mutates_args=(), device_types="cuda")
    def of_a_gpu_alone(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(NotImplementedError, match="MPS"):
        as_on("MPS", torch.ops.hfc_tests.of_a_gpu_alone.default, (torch.ones(1),))


@pytest.mark.parametrize("K", [1, 40, 1024, 1025, 3000])
def test_products_of_8_bit_are_exact_without_float64(K):
    """Worked out in int64: the largest products a row can have, of one sign."""
    from hf_compress_kernels.reference import w8a8_linear

    x = torch.ones(2, K)
    x[1] = -1
    qweight = torch.stack([torch.full((K,), 127), torch.full((K,), -128), torch.arange(K) % 251 - 125]).to(torch.int8)
    y = w8a8_linear(x, qweight, torch.full((3,), 127.0), None)  # the scales cancel: y = +-sum of the row, times 127
    expected = 127 * qweight.long().sum(1).double() * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(y.double(), expected, rtol=3e-7, atol=0)  # two roundings of float32
