"""What runs a packed layer is no state: it follows the stored tensors, is never saved, and passes gradients on."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from hf_compress.engines import low_bit, pieces, processor, routes
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.packed_embedding import PackedEmbedding, TiedHead
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.packed_module import routes_of
from hf_compress.layers.scheme import WeightScheme
from tests.engines.test_routes import BOUNDS, SCHEMES, K, N, error, packed_layer


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)


@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
@torch.no_grad()
def test_a_run_is_no_state(decodes):
    layer, x = packed_layer(SCHEMES["4-bit"], decodes=decodes), torch.randn(2, K)
    before = list(layer.state_dict())
    y = layer(x)
    assert list(layer.state_dict()) == before
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.run is None and twin.decodes is decodes
        assert torch.equal(twin(x), y)
    assert copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16()).dtype is torch.bfloat16
    gone = weakref.ref(layer.run)
    del layer
    gc.collect()
    assert gone() is None


class Scaled(nn.Embedding):
    """What Gemma and BART do: a class that adds something to the lookup."""

    def __init__(self, num: int, dim: int, scale: float):
        super().__init__(num, dim)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def test_a_model_with_packed_tables_can_be_pickled_and_copied():
    table = PackedEmbedding.like(Scaled(96, 256, 3.0), WeightScheme(8))
    q = torch.randint(0, 256, (96, 256), dtype=torch.uint8)
    table.fill(q, torch.rand(96, 1) + 0.1, torch.full((96, 1), 7, dtype=torch.uint8))
    assert type(PackedEmbedding.like(Scaled(4, 32, 1.0), WeightScheme(8))) is type(table)  # one class for each pair
    model = nn.ModuleDict({"table": table, "head": TiedHead(table, None)})
    ids, x = torch.tensor([3, 95]), torch.randn(2, 256)
    with torch.no_grad():
        expected = model["table"](ids), model["head"](x)
        torch.testing.assert_close(expected[0], 3 * table.dequantize()[ids])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin["table"](ids), expected[0]) and torch.equal(twin["head"](x), expected[1])
            assert twin["head"].table is twin["table"] is not table


@torch.no_grad()
def test_a_changed_tensor_makes_the_run_anew():
    layer, x = packed_layer(SCHEMES["4-bit"], bias=False), torch.randn(2, K)
    y = layer(x)
    other = packed_layer(SCHEMES["4-bit"], bias=False, seed=1)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.scales.mul_(0)
    assert bool((layer(x) == 0).all()) and not torch.equal(y, layer(x))
    layer.scales = other.scales.clone()
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("scheme", ["4-bit", "4-bit-act-order", "8-bit-rows"])
@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
def test_gradients_are_those_of_the_stored_weight(scheme, decodes):
    layer = packed_layer(SCHEMES[scheme], decodes=decodes)
    x = torch.randn(3, 2, K, requires_grad=True)
    layer.bias.requires_grad_()
    upstream = torch.randn(3, 2, N)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantize(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(N, K), (24, 64)], ids=["with-a-route", "without"])
@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(8, -1, symmetric=True, activation_bits=8),
        WeightScheme(8, 32, activation_bits=8),
        WeightScheme(4, 32, activation_bits=8, activation_range=(-1.0, 1.5)),
        WeightScheme(8, -1, symmetric=True, activation_bits=8, activation_range=(-1.0, 1.5)),
    ],
    ids=["tokens-rows", "tokens-groups", "range-groups", "range-rows"],
)
def test_gradients_pass_straight_through_rounded_inputs(scheme, shape, dtype):
    layer = PackedLinear(shape[1], shape[0], scheme, bias=False)
    q = torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)
    groups = scheme.num_groups(shape[1])
    zeros = torch.full((groups, shape[0]), 2 ** (scheme.bits - 1), dtype=torch.uint8)
    layer.fill(q, torch.rand(groups, shape[0]) + 0.1, zeros)
    x = torch.randn(5, shape[1]).to(dtype).requires_grad_()
    upstream = torch.randn(5, shape[0]).to(dtype)
    layer(x).backward(upstream)
    expected = upstream.double() @ layer.dequantize(torch.float64)
    if scheme.activation_range is not None:
        inside = (x.detach() > -0.99) & (x.detach() < 1.49)
        outside = (x.detach() < -1.01) | (x.detach() > 1.51)
        assert bool((x.grad[outside] == 0).all()) and bool(outside.any())
        expected, got = expected[inside], x.grad[inside]
    else:
        got = x.grad
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert float((got.double() - expected).norm() / expected.norm()) <= bound


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("scheme", ["4-bit", "8-bit-rows", "8-bit-groups"])
def test_compiles_in_one_graph(grad, scheme):
    torch._dynamo.reset()
    layer, x = packed_layer(SCHEMES[scheme]), torch.randn(2, K, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        got = compiled(x)
        distance = (got - expected).detach().norm() / expected.detach().norm()
        assert float(distance) <= 2e-2  # training takes the plain path
        assert grad or torch.equal(got, expected)
        if grad:
            got.sum().backward()
            torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, K), rtol=1e-5, atol=1e-3)


def graph_of(layer: nn.Module, *inputs: Tensor, dynamic: bool = False) -> tuple[list[Tensor], list[str]]:
    """The compiled layer's outputs, and the names of the operators in its graphs."""
    torch._dynamo.reset()
    names = []

    def keep_names(graph, examples):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=keep_names, dynamic=dynamic)
    return [compiled(x) for x in inputs], names


@pytest.mark.parametrize("scheme", ["4-bit", "3-bit", "4-bit-act-order", "8-bit-rows"])
@torch.no_grad()
def test_a_compiled_decoding_step_holds_the_kernel_itself(scheme):
    layer = packed_layer(SCHEMES[scheme], decodes=True)
    x, prompt = torch.randn(1, 2, K), torch.randn(1, 70, K)
    (few, many), names = graph_of(layer, x, prompt)
    kernel = "_weight_int8pack_mm" if "8" in scheme else "_weight_int4pack_mm_for_cpu"
    assert sum(kernel in name for name in names) == sum("hf_compress" in name for name in names) == 1
    assert torch.equal(few, layer(x)) and torch.equal(many, layer(prompt))


@torch.no_grad()
def test_a_compiled_step_sees_new_weights_and_new_lengths():
    layer = packed_layer(SCHEMES["4-bit"], decodes=True)
    other = packed_layer(SCHEMES["4-bit"], seed=1, decodes=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, prompt = torch.randn(1, K), torch.randn(40, K)
    assert torch.equal(compiled(x), layer(x)) and torch.equal(compiled(prompt), layer(prompt))
    layer.load_state_dict(other.state_dict())
    layer.prepare()
    assert torch.equal(compiled(x), other(x)) and torch.equal(compiled(prompt), other(prompt))
    inputs = [torch.randn(n, K) for n in (3, 5, 7, 9)]
    outputs, names = graph_of(layer, *inputs, dynamic=True)
    assert all(torch.equal(y, layer(x)) for x, y in zip(inputs, outputs, strict=True))
    assert sum("_weight_int4pack_mm_for_cpu" in name for name in names) == 1  # one graph for every length


@torch.no_grad()
def test_two_layers_compiled_by_one_code_keep_their_weights_apart():
    torch._dynamo.reset()
    layers = [packed_layer(SCHEMES["8-bit-groups"], seed=seed) for seed in range(3)]
    compiled = [torch.compile(layer, backend="eager") for layer in layers]
    x = torch.randn(4, K)
    for layer, one in zip(layers, compiled, strict=True):
        assert torch.equal(one(x), layer(x))
    sparse = [BlockSparseLinear.from_dense(nn.Linear(256, 256), torch.eye(8), (32, 32)) for _ in range(2)]
    for layer in sparse:
        x = torch.randn(4, 256)
        assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


@pytest.mark.parametrize("mode", ["auto", "exact", "reference"])
@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_gives_what_inputs_of_that_dtype_give(scheme, decodes, mode, monkeypatch):
    """The product of a layer keeps its own dtypes inside: `exact` stays float32 there."""
    monkeypatch.setenv(processor.VARIABLE, mode)
    check_autocast(packed_layer(SCHEMES[scheme], decodes=decodes), K)


@pytest.mark.parametrize("fast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.05, 0.95], ids=["sparse", "nearly-dense"])
def test_autocast_gives_what_inputs_of_that_dtype_give_to_blocks(share, fast, monkeypatch):
    """Float32 blocks of few are MKL's, which has no such product in bfloat16."""
    monkeypatch.setattr(processor, "has_bfloat16", lambda: fast)
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < share
    check_autocast(BlockSparseLinear.from_dense(nn.Linear(256, 256), mask, (16, 16)), 256)


def check_autocast(layer: nn.Module, columns: int) -> None:
    for M in (1, 40):
        x = torch.randn(M, columns)
        for learns in (False, True):  # inference, and gradients that pass the layer on
            inputs = x.clone().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                expected = layer(inputs.bfloat16())
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = layer(inputs)
            assert found.dtype is torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("scheme", ["4-bit", "8-bit-rows", "8-bit-groups"])
@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
def test_threads_that_share_a_layer_get_the_answers_of_one(scheme, decodes):
    layer = packed_layer(SCHEMES[scheme], decodes=decodes)
    inputs = [torch.randn(1 + n % 40, K) for n in range(60)]
    with torch.no_grad():
        expected = [copy.deepcopy(layer)(x) for x in inputs]

    def answer(n: int) -> Tensor:
        with torch.no_grad():
            return layer(inputs[n])

    with ThreadPoolExecutor(8) as pool:
        for n, y in zip(list(range(60)) * 4, pool.map(answer, list(range(60)) * 4), strict=True):
            # MKL sums in another order where other threads are busy: a few units in the last place
            torch.testing.assert_close(y, expected[n], rtol=1e-5, atol=1e-5 * float(expected[n].abs().max()))


def test_pieces_cover_all_rows_in_few_sizes():
    sizes = set()
    for rows in range(1, 9000):
        parts = list(pieces.pieces(rows))
        assert sum(real for real, _ in parts) == rows
        assert all(real <= size <= max(pieces.SMALLEST, real * 9 / 8 + 1) for real, size in parts)
        sizes |= {size for _, size in parts}
    assert sizes == {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096}
    x, weight = torch.randn(75, 16), torch.randn(5, 16)
    y = pieces.in_pieces(x, lambda rows: rows @ weight.t(), 5, torch.float32)
    torch.testing.assert_close(y, x @ weight.t())


@torch.no_grad()
def test_a_codebook_in_an_encoder_is_looked_up_once():
    layer = CodebookLinear(K, N, WeightScheme(3, 64, num_levels=8), dtype=torch.float32)
    layer.fill(torch.randint(0, 8, (N, K), dtype=torch.uint8), torch.randn(K // 64, N, 8))
    x = torch.randn(7, K)
    run, oracle = layer.infer, x.double() @ layer.dequantize(torch.float64).t()
    assert float((layer(x) - oracle).norm() / oracle.norm()) <= 5e-3
    assert layer.run is not None and run(x, None) is not None
    layer.prepare(decodes=True)
    assert layer.route is None and float((layer(x) - oracle).norm() / oracle.norm()) <= 2e-6


@torch.no_grad()
def test_a_model_tells_what_ran():
    model = nn.ModuleList([packed_layer(SCHEMES["4-bit"]), packed_layer(SCHEMES["4-bit"], decodes=True)])
    model.append(PackedLinear(64, 64, WeightScheme(4, 32)))
    assert routes_of(model) == {"not run yet": 2, "dequantized in each call": 1}
    for layer in model[:2]:
        layer(torch.randn(2, K))
    dense = routes.choose_dense(N * K).name
    per_call = f"{'bfloat16' if processor.has_bfloat16() else 'float32'} per call"
    assert routes_of(model) == {
        dense: 1, f"{low_bit.Int4.name}, {per_call} for many tokens": 1, "dequantized in each call": 1
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["4-bit", "8-bit-rows", "8-bit-groups", "3-bit"])
def test_long_lookups_are_those_of_single_rows(scheme):
    layer = PackedEmbedding(700, K, SCHEMES[scheme], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    G, bits = layer.scales.shape[1], SCHEMES[scheme].bits
    numbers = [torch.randint(0, 2**bits, (700, n), generator=generator, dtype=torch.uint8) for n in (K, G)]
    layer.fill(numbers[0], torch.rand(700, G, generator=generator), numbers[1])
    oracle = layer.dequantize(torch.float32).bfloat16()
    for shape in ((), (3,), (2, 300), (40, 50)):  # one by one, in parts, and the whole table
        ids = torch.randint(0, 700, shape, generator=generator)
        assert torch.equal(layer(ids), oracle[ids])
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(ids), oracle[ids])


def test_the_bounds_are_those_of_the_documentation():
    assert error(torch.zeros(1, N), packed_layer(SCHEMES["4-bit"], bias=False), torch.randn(1, K)) == 1.0
    assert max(BOUNDS.values()) == 2e-2
