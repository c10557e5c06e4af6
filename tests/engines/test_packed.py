"""The CPU engines of packed linear layers against float64, and that they leave the layers' state alone."""

import copy
import gc
import multiprocessing
import pickle

import pytest
import torch
from torch import Tensor

from hf_compress.engines import bodies, kept, packed, processor
from hf_compress.engines.integers import integers
from hf_compress.layers.packed_embedding import PackedEmbedding, TiedHead
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme

N, K = 192, 576
SCHEMES = {
    "2-bit": WeightScheme(2, 64),
    "3-bit": WeightScheme(3, 64),
    "4-bit": WeightScheme(4, 64),
    "4-bit-symmetric": WeightScheme(4, 32, symmetric=True),
    "4-bit-act-order": WeightScheme(4, 64, desc_act=True),
    "8-bit-groups": WeightScheme(8, 64),
    "8-bit-rows": WeightScheme(8),
    "8-bit-rows-symmetric": WeightScheme(8, symmetric=True),
}
BOUNDS = {"float32": 2e-6, "bfloat16": 5e-3, "int4": 6e-3, "int8_weights": 6e-3, "int8_products": 2e-2,
          "fbgemm": 3e-2, "onednn": 3e-2, "onnxruntime": 2e-2}  # fmt: skip
TAKES = {  # engine -> schemes it must take
    "float32": set(SCHEMES),
    "bfloat16": set(SCHEMES),
    "int4": {name for name in SCHEMES if name[0] in "234"},
    "int8_weights": {"8-bit-rows", "8-bit-rows-symmetric"},
    "int8_products": {"8-bit-rows-symmetric"},
    "fbgemm": {"8-bit-rows", "8-bit-rows-symmetric"},
    "onednn": {"8-bit-rows-symmetric"},
    "onnxruntime": set(SCHEMES),
}
needs_avx512 = pytest.mark.skipif(processor.instructions() == "other", reason="needs AVX-512")


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)


def packed_layer(scheme: WeightScheme, *, bias: bool = True, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer, G = PackedLinear(K, N, scheme, bias=bias), scheme.num_groups(K)
    q = torch.randint(0, 2**scheme.bits, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**scheme.bits, (G, N), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zeros = torch.full_like(zeros, 2 ** (scheme.bits - 1))
    g_idx = torch.randperm(K, generator=generator) % G if scheme.desc_act else None
    layer.fill(q, torch.rand(G, N, generator=generator) + 0.1, zeros, g_idx)
    if bias:
        layer.bias.data = torch.randn(N, generator=generator)
    return layer.requires_grad_(False)


def error(y: Tensor, layer: PackedLinear, x: Tensor) -> float:
    oracle = x.double() @ layer.dequantize(torch.float64).t()
    if layer.bias is not None:
        oracle = oracle + layer.bias.double()
    return float((y.double() - oracle).norm() / oracle.norm())


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("M", [1, 3, 17, 64])
@pytest.mark.parametrize("name", bodies.BODIES)
def test_every_engine_keeps_its_error_bound(name, M, dtype):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
    for scheme in TAKES[name]:
        layer = packed_layer(SCHEMES[scheme])
        body = bodies.BODIES[name](integers(layer._stored()))
        y = body(x, layer.bias)
        assert y.dtype is dtype
        rounding = 4e-3 if dtype is torch.bfloat16 else 0  # of the output
        assert error(y, layer, x) <= BOUNDS[name] + rounding, scheme
        assert torch.equal(body(x, layer.bias), y)  # the same bits on every run


@needs_avx512
@pytest.mark.parametrize("name", ["int4", "int8_weights", "int8_products", "fbgemm"])
def test_an_engine_refuses_what_its_kernel_does_not_take(name):
    for scheme in set(SCHEMES) - TAKES[name]:
        with pytest.raises(ValueError, match="The kernel needs"):
            bodies.BODIES[name](integers(packed_layer(SCHEMES[scheme])._stored()))


@needs_avx512
def test_integer_products_are_exact_for_the_rounded_tokens():
    layer, x = packed_layer(SCHEMES["8-bit-rows-symmetric"], bias=False), torch.randn(5, K)
    x[2] = 0
    scale = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(scale > 0, x / scale, 0.0).round().double() * scale.double()
    y = bodies.Int8Products(integers(layer._stored()))(x, None)
    torch.testing.assert_close(y.double(), rounded @ layer.dequantize(torch.float64).t(), rtol=2e-6, atol=1e-5)
    assert bool((y[2] == 0).all())


@pytest.mark.parametrize("instructions", ["amx", "avx512_bf16", "avx512_vnni", "other"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_processor_gives_an_answer_within_the_bounds(scheme, instructions, monkeypatch):
    if processor.instructions() == "other" and instructions != "other":
        pytest.skip("this processor lacks the instructions")
    monkeypatch.setattr(processor, "instructions", lambda: instructions)
    processor.candidates.cache_clear()
    try:
        layer = packed_layer(scheme)
        for route in ("auto", "one_copy"):
            for M in (0, 1, 6, 70):
                x = torch.randn(M, K)
                y = packed.packed_linear(x, layer.bias, layer._stored(), route)
                assert y.shape == (M, N)
                assert M == 0 or error(y, layer, x) <= 3e-2
    finally:
        processor.candidates.cache_clear()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dequantizing_for_one_call_is_the_same_weight(scheme):
    layer, x = packed_layer(scheme), torch.randn(4, K)
    assert error(packed._once(x, layer.bias, layer._stored(), torch.float32), layer, x) <= 2e-6
    assert error(packed._once(x, layer.bias, layer._stored(), torch.bfloat16), layer, x) <= 8e-3


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_tied_head_multiplies_by_the_packed_table(bits, monkeypatch):
    table = PackedEmbedding(96, 256, WeightScheme(bits))
    q = torch.randint(0, 2**bits, (96, 256), dtype=torch.uint8)
    table.fill(q, torch.rand(96, 1) + 0.1, torch.randint(0, 2**bits, (96, 1), dtype=torch.uint8))
    assert table.route == "auto"
    ids = torch.tensor([[3, 0], [95, 3]])
    assert torch.equal(table(ids), table.dequantize()[ids])
    head = TiedHead(table, None)
    for M in (1, 40):
        x = torch.randn(M, 256)
        oracle = x.double() @ table.dequantize(torch.float64).t()
        assert float((head(x) - oracle).norm() / oracle.norm()) <= 2e-2
        once = packed._once(x, None, table.stored(), torch.float32)
        torch.testing.assert_close(once.double(), oracle, rtol=1e-4, atol=1e-3)
    assert head(torch.randn(2, 3, 256, dtype=torch.bfloat16)).shape == (2, 3, 96)


def test_modes(monkeypatch):
    x, layer = torch.randn(20, K), packed_layer(SCHEMES["4-bit"])
    monkeypatch.setenv(processor.VARIABLE, "exact")
    layer.prepare()
    assert error(layer(x), layer, x) <= 2e-6
    monkeypatch.setenv(processor.VARIABLE, "reference")
    layer.prepare()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    monkeypatch.setenv(processor.VARIABLE, "fastest")
    with pytest.raises(ValueError, match="HF_COMPRESS_CPU must be one of"):
        layer.prepare()


def test_a_small_layer_needs_no_engine():
    layer = PackedLinear(64, 64, WeightScheme(4, 32))
    assert layer.fill(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(2, 64), torch.zeros(2, 64)).route is None


def made_for(layer: PackedLinear) -> dict:
    return made_of(id(layer.qweight))


def made_of(key: int) -> dict:
    return kept._kept[key][1]


def test_engines_are_no_state():
    layer, x = packed_layer(SCHEMES["4-bit"]), torch.randn(2, K)
    before = list(layer.state_dict())
    with torch.no_grad():
        y = layer(x)
    assert list(layer.state_dict()) == before
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert id(twin.qweight) not in kept._kept
        with torch.no_grad():
            assert torch.equal(twin(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.no_grad():
        assert half(x.bfloat16()).dtype is torch.bfloat16
    mine, key = made_for(layer), id(layer.qweight)
    del layer
    gc.collect()
    assert key not in kept._kept or made_of(key) is not mine


def test_a_changed_tensor_makes_the_engine_anew():
    layer, x = packed_layer(SCHEMES["4-bit"], bias=False), torch.randn(2, K)
    with torch.no_grad():
        y = layer(x)
        other = packed_layer(SCHEMES["4-bit"], bias=False, seed=1)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.scales.mul_(0)
        assert bool((layer(x) == 0).all()) and not torch.equal(y, layer(x))
        layer.scales = other.scales.clone()
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("scheme", ["4-bit", "4-bit-act-order", "8-bit-rows"])
def test_gradients_are_those_of_the_stored_weight(scheme):
    layer, x = packed_layer(SCHEMES[scheme]), torch.randn(3, 2, K, requires_grad=True)
    layer.bias.requires_grad_()
    upstream = torch.randn(3, 2, N)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantize())
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiles_in_one_graph_with_the_same_engine(grad):
    torch._dynamo.reset()
    layer, x = packed_layer(SCHEMES["4-bit"]), torch.randn(2, K, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        known = len(kept._kept)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        assert len(kept._kept) == known
        if grad:
            compiled(x).sum().backward()
            torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, K))


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


def graph_of(layer: PackedLinear, *inputs: Tensor, dynamic: bool = False) -> tuple[list[Tensor], list[str]]:
    """The compiled layer's outputs, and the names of the operators in its graphs."""
    torch._dynamo.reset()
    names = []

    def keep_names(graph, examples):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=keep_names, dynamic=dynamic)
    return [compiled(x) for x in inputs], names


@needs_avx512
@pytest.mark.parametrize("scheme", ["4-bit", "3-bit", "4-bit-act-order", "8-bit-rows"])
@torch.no_grad()
def test_a_compiled_decoding_step_holds_the_kernel_itself(scheme):
    layer = packed_layer(SCHEMES[scheme])
    layer.one_copy = True
    layer.prepare()
    x, prompt = torch.randn(1, 2, K), torch.randn(1, 70, K)
    (few, many), names = graph_of(layer, x, prompt)
    kernel = "_weight_int8pack_mm" if "8" in scheme else "_weight_int4pack_mm_for_cpu"
    assert sum(kernel in name for name in names) == sum("packed_linear" in name for name in names) == 1
    assert torch.equal(few, layer(x)) and torch.equal(many, layer(prompt))


@needs_avx512
@torch.no_grad()
def test_a_compiled_step_sees_new_weights_and_new_lengths():
    layer, other = packed_layer(SCHEMES["4-bit"]), packed_layer(SCHEMES["4-bit"], seed=1)
    for one in (layer, other):
        one.one_copy = True
        one.prepare()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(1, K)
    assert torch.equal(compiled(x), layer(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))
    again = copy.deepcopy(layer)
    assert again.in_graph is None and layer.in_graph is not None
    assert pickle.loads(pickle.dumps(layer)).in_graph is None
    inputs = [torch.randn(n, K) for n in (3, 5, 7, 9)]
    outputs, names = graph_of(layer, *inputs, dynamic=True)
    assert all(torch.equal(y, layer(x)) for x, y in zip(inputs, outputs, strict=True))
    assert sum("_weight_int4pack_mm_for_cpu" in name for name in names) == 1  # one graph for every length


def test_a_missing_engine_means_a_slower_path(monkeypatch):
    def missing(weight):
        raise NotImplementedError("Could not run 'mkldnn::_linear_pointwise'")

    monkeypatch.setattr(packed, "BODIES", dict.fromkeys(bodies.BODIES, missing))
    layer, x = packed_layer(SCHEMES["4-bit"]), torch.randn(20, K)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert {engine for engine in made_for(layer).values() if not isinstance(engine, torch.dtype)} == {None}


def _in_a_worker(layer, x, queue):
    with torch.no_grad():
        queue.put(layer(x).tolist())


def test_a_forked_worker_runs_it():
    layer, x = packed_layer(SCHEMES["4-bit"]), torch.randn(2, K)
    with torch.no_grad():
        y = layer(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_a_worker, args=(layer, x, queue))
    worker.start()
    assert queue.get(timeout=30) == y.tolist()
    worker.join()


def test_autocast_runs_it_in_the_lower_precision():
    layer = packed_layer(SCHEMES["4-bit"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, K)).dtype is torch.bfloat16


@needs_avx512
def test_the_short_way_to_an_engine_is_no_state():
    layer, x = packed_layer(SCHEMES["4-bit"]), torch.randn(3, K)
    with torch.no_grad():
        first, again = layer(x), layer(x)
    assert layer.direct is not None
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(layer(x).detach(), first, rtol=0, atol=0)  # with gradients, by the operator
    assert copy.deepcopy(layer).direct is None and pickle.loads(pickle.dumps(layer)).direct is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double().direct is None
