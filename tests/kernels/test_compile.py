"""Every operator passes `opcheck`, and every public function compiles whole, with dynamic shapes and gradients."""

import pytest
import torch
from functorch.compile import make_boxed_func
from hf_compress_kernels import (
    bsr_from_dense,
    bsr_linear,
    gptq_quantize_block,
    kl_from_logits,
    w8a8_linear,
    wna16_dequant,
    wna16_linear,
    wna16_pack,
)
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

from tests.kernels.oracle import plain_only, random_layer

pytestmark = plain_only
NAMESPACE = "hf_compress_kernels"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(bits=3, dtype=torch.float32):
    layer = random_layer(bits, 64, 96, 32, act_order=True)
    return wna16_pack(layer.ints, layer.scales, layer.zeros, bits, 32, dtype, layer.g_idx)


def sparse_weight():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)  # one row of blocks is empty
    return bsr_from_dense(drawn(48, 64), mask, (16, 16))


PACKED, SPARSE = packed_weight(), sparse_weight()
STEPS, ZEROS, CHANNELS = torch.rand(6, 2) + 0.1, torch.full((6, 2), 3.0), torch.rand(24) + 0.1

# public function -> its arguments for a number of rows; those that float and come first take gradients
CALLS = {
    "wna16_linear": (wna16_linear, lambda M: (drawn(M, 96), PACKED, drawn(64))),
    "wna16_dequant": (wna16_dequant, lambda M: (PACKED,)),
    "bsr_linear": (bsr_linear, lambda M: (drawn(M, 64), SPARSE, drawn(48))),
    "kl_from_logits": (kl_from_logits, lambda M: (drawn(M, 30), drawn(M, 30, seed=1), drawn(M) > 0)),
    "gptq_quantize_block": (gptq_quantize_block, lambda M: (drawn(6, 4 * M), torch.eye(4 * M), STEPS, ZEROS, 15)),
    "w8a8_linear": (w8a8_linear, lambda M: (drawn(M, 40), torch.ones(24, 40, dtype=torch.int8), CHANNELS)),
}
GRADIENTS = {"wna16_linear": (0, 2), "bsr_linear": (0, 2), "kl_from_logits": (0,)}


def result_and_gradients(function, name, rows):
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in CALLS[name][1](rows)]
    leaves = [args[i].requires_grad_() for i in GRADIENTS.get(name, ())]
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if leaves:
        outputs[0].float().sin().sum().backward()
    return [output.detach() for output in outputs], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_dynamic_shapes_and_gradients(name):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count)
    compiled = torch.compile(CALLS[name][0], fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 8, 17):
        for made, wanted in zip(
            result_and_gradients(compiled, name, rows), result_and_gradients(CALLS[name][0], name, rows), strict=True
        ):
            torch.testing.assert_close(made, wanted)
    forwards = len(graphs) if name not in GRADIENTS else len(graphs) / 2
    assert forwards <= 2, f"{name} was compiled {forwards} times for three sizes"


def cases():
    """Arguments of each operator below the public functions, by its name in the namespace."""
    x, bias, grad = drawn(3, 96).requires_grad_(), drawn(64).requires_grad_(), drawn(3, 48)
    values = SPARSE.values.clone().requires_grad_()
    student, teacher, mask = drawn(3, 30).requires_grad_(), drawn(3, 30, seed=1), torch.tensor([True, False, True])
    rows = torch.ones(3)
    *packed, dtype = PACKED
    return {
        "wna16_linear": (x, bias, *packed),
        "wna16_dequant": (*packed, dtype),
        "bsr_linear": (drawn(3, 64).requires_grad_(), drawn(48), *SPARSE._replace(values=values)),
        "bsr_linear_dx": (grad, *SPARSE),
        "bsr_linear_dw": (grad, drawn(3, 64), *SPARSE[:3]),
        "kl_from_logits": (student, teacher, mask, 2.0),
        "kl_from_logits_grad": (rows, student.detach(), teacher, rows, rows, mask, 2.0),
        "gptq_quantize_block": (drawn(6, 16), torch.eye(16), STEPS, ZEROS, 15),
        "w8a8_linear": (drawn(3, 40), torch.ones(24, 40, dtype=torch.int8), CHANNELS, None),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_operator_passes_opcheck(name):
    opcheck(getattr(getattr(torch.ops, NAMESPACE), name).default, cases()[name])


def test_no_operator_is_left_out():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{NAMESPACE}::")}
    assert registered == set(cases())
