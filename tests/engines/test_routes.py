"""The products of packed weights on a CPU against float64, and the rule that chooses them."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from hf_compress.engines import low_bit, processor, rounding, routes
from hf_compress.engines.packed_weight import Stored
from hf_compress.engines.rounding import round_to_bytes, rounded_rows
from hf_compress.layers.activations import round_per_token, round_to_range
from hf_compress.layers.packed_embedding import PackedEmbedding, TiedHead
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model import precision

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
BOUNDS = {"float32": 2e-6, "float32 by oneDNN": 2e-6, "float32 per call": 2e-6, "bfloat16": 5e-3,
          "bfloat16 per call": 8e-3, "8-bit integers": 2e-2, "4-bit kernel": 6e-3, "4-bit kernel twice": 6e-3,
          "8-bit kernel": 6e-3}  # fmt: skip
KERNELS = {"4-bit kernel": low_bit.Int4, "4-bit kernel twice": low_bit.Int8Halves, "8-bit kernel": low_bit.Int8Weights}
TAKEN = {
    "4-bit kernel": {name for name in SCHEMES if name[0] in "234"},
    "4-bit kernel twice": {name for name in SCHEMES if name[0] == "8"},
    "8-bit kernel": {"8-bit-rows", "8-bit-rows-symmetric"},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
needs_vnni = pytest.mark.skipif(not processor.has_int8(), reason="needs exact products of 8-bit integers")
needs_bfloat16 = pytest.mark.skipif(not processor.has_bfloat16(), reason="needs AMX, or AVX512_BF16 of AMD")


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)


def packed_layer(scheme: WeightScheme, *, bias: bool = True, seed: int = 0, decodes: bool = False) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer, G = PackedLinear(K, N, scheme, bias=bias), scheme.num_groups(K)
    q = torch.randint(0, 2**scheme.bits, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**scheme.bits, (G, N), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zeros = torch.full_like(zeros, 2 ** (scheme.bits - 1))
    g_idx = torch.randperm(K, generator=generator) % G if scheme.desc_act else None
    layer.fill(q, torch.rand(G, N, generator=generator) + 0.1, zeros, g_idx)
    layer.prepare(decodes=decodes)
    if bias:
        layer.bias.data = torch.randn(N, generator=generator)
    return layer.requires_grad_(False)


def error(y: Tensor, layer: PackedLinear, x: Tensor) -> float:
    oracle = x.double() @ layer.dequantize(torch.float64).t()
    if layer.bias is not None:
        oracle = oracle + layer.bias.double()
    return float((y.double() - oracle).norm() / oracle.norm())


@DTYPES
@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@torch.no_grad()
def test_whatever_runs_here_keeps_its_bound(scheme, decodes, dtype):
    layer = packed_layer(scheme, decodes=decodes)
    output_rounding = {torch.float32: 0, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for M in (0, 1, 6, 33, 70):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        y = layer(x)
        assert y.shape == (M, N) and y.dtype is dtype
        run = layer.run.pick(M) if isinstance(layer.run, routes.FewAndMany) else layer.run
        assert M == 0 or error(y, layer, x) <= BOUNDS[run.name] + output_rounding
        assert torch.equal(layer(x), y)  # the same bits on every call


@pytest.mark.parametrize("name", KERNELS)
@torch.no_grad()
def test_a_kernel_for_few_tokens_takes_just_its_weights(name):
    for scheme in SCHEMES:
        layer = packed_layer(SCHEMES[scheme])
        assert KERNELS[name].takes(layer.stored()) == (scheme in TAKEN[name]), scheme
        if scheme in TAKEN[name]:
            for M in (1, 5):
                x = torch.randn(M, K)
                assert error(KERNELS[name](layer.stored())(x, layer.bias), layer, x) <= BOUNDS[name], scheme


@pytest.mark.parametrize("shape", [(190, 576), (192, 570)], ids=["odd-outputs", "odd-inputs"])
def test_a_kernel_never_sees_a_shape_that_it_reads_beyond(shape):
    for scheme in (WeightScheme(4), WeightScheme(8)):
        layer = PackedLinear(shape[1], shape[0], scheme)
        assert not any(kernel.takes(layer.stored()) for kernel in KERNELS.values())


def test_uneven_groups_are_left_to_other_routes():
    layer = packed_layer(SCHEMES["4-bit-act-order"])
    layer.g_idx[0] = (layer.g_idx[0] + 1) % len(layer.scales)
    assert not low_bit.Int4.takes(layer.stored())
    layer.prepare(decodes=True)
    x = torch.randn(2, K)
    with torch.no_grad():
        assert error(layer(x), layer, x) <= 8e-3


def rule(monkeypatch, scheme: str, *, int8: bool, bfloat16: bool, slow_mkl: bool = False, **said) -> str:
    """The name of what would run, on a processor with such abilities."""
    monkeypatch.setattr(processor, "has_int8", lambda: int8)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(processor, "has_avx512", lambda: int8)
    monkeypatch.setattr(processor, "has_slow_mkl", lambda: slow_mkl)
    route = routes.choose(packed_layer(SCHEMES[scheme]).stored(), **said)
    parts = [route] if not hasattr(route, "args") else [route.func, *route.args]
    return " ".join(getattr(part, "__name__", None) or part.func.__name__ for part in parts)


@pytest.mark.parametrize(
    ("scheme", "said", "few", "vnni", "bf16"),
    [
        ("8-bit-rows", dict(decodes=False), "Float32", "Int8Rows", "BFloat16"),
        ("8-bit-rows", dict(decodes=False, rounds=True), "Float32", "Int8Rows", "Int8Rows"),
        ("8-bit-rows", dict(decodes=True), "FewAndMany Int8Weights PerCall",
         "FewAndMany Int8Weights Int8Rows", "FewAndMany Int8Weights Int8Rows"),
        ("8-bit-rows", dict(decodes=True, rounds=True), "FewAndMany Int8Weights PerCall", "Int8Rows", "Int8Rows"),
        ("8-bit-groups", dict(decodes=False), "Float32", "Float32", "BFloat16"),
        ("8-bit-groups", dict(decodes=True), "Float32", *["FewAndMany Int8Halves PerCall"] * 2),
        ("4-bit", dict(decodes=False), "Float32", "Float32", "BFloat16"),
        ("3-bit", dict(decodes=True), *["FewAndMany Int4 PerCall"] * 3),
    ],
)  # fmt: skip
def test_the_rule(monkeypatch, scheme, said, few, vnni, bf16):
    assert rule(monkeypatch, scheme, int8=False, bfloat16=False, **said) == few
    assert rule(monkeypatch, scheme, int8=True, bfloat16=False, **said) == vnni
    assert rule(monkeypatch, scheme, int8=True, bfloat16=True, **said) == bf16
    monkeypatch.setenv(processor.VARIABLE, "exact")
    assert rule(monkeypatch, scheme, int8=True, bfloat16=True, **said) == "Float32"
    monkeypatch.setenv(processor.VARIABLE, "reference")
    assert routes.choose(packed_layer(SCHEMES[scheme]).stored(), **said) is None


def test_dense_float32_goes_to_onednn_where_mkl_is_slow(monkeypatch):
    abilities = dict(slow_mkl=True, decodes=False)
    assert rule(monkeypatch, "4-bit", int8=False, bfloat16=False, **abilities) == "OneDnnFloat32"
    assert rule(monkeypatch, "4-bit", int8=True, bfloat16=True, **abilities) == "BFloat16"


def test_one_token_after_another_goes_to_mkl_all_the_same(monkeypatch):
    abilities = dict(slow_mkl=True, decodes=True)
    assert rule(monkeypatch, "8-bit-groups", int8=False, bfloat16=False, **abilities) == "Float32"
    assert rule(monkeypatch, "8-bit-groups", int8=False, bfloat16=True, **abilities) == "BFloat16"


def test_a_torch_without_onednn_multiplies_dense_matrices(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for ability in (processor.has_int8, processor.has_slow_mkl, precision.cpu_has_bfloat16):
        assert not ability.__wrapped__()


def test_a_processor_is_asked_whether_its_integers_are_exact(monkeypatch):
    """Below VNNI pairs of products are clipped at 16 bits: here as oneDNN answers on such a processor."""
    monkeypatch.setattr(processor, "is_x86_with_onednn", lambda: True)
    clipped = lambda q, *rest: torch.full((1, 16), 32.0 * 32767)  # noqa: E731
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", clipped)
    assert not processor.has_int8.__wrapped__()
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda q, *rest: torch.full((1, 16), 64.0 * 255 * 127))
    assert processor.has_int8.__wrapped__()


def as_a_reference(q: Tensor, scale: float, zero: int, packed: Tensor, scales: Tensor, *rest) -> Tensor:
    _, bias, _, _, dtype, *_ = rest
    y = (q.double() - zero) @ packed.double().t() * scales.double() * scale
    return (y if bias is None else y + bias.double()).to(dtype)


@pytest.fixture
def integer_products(monkeypatch):
    """Exact products of 8-bit integers, by a slow reference where the processor has none."""
    if not processor.has_int8():
        monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda weight, shape: weight)
        monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", as_a_reference)


@pytest.mark.parametrize("scheme", ["8-bit-rows", "8-bit-rows-symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_integer_products_are_exact_for_the_rounded_inputs(scheme, dtype, integer_products):
    layer = packed_layer(SCHEMES[scheme], bias=False)
    x = torch.randn(5, K).to(dtype)
    x[2] = 0
    for activation_range in (None, (-1.5, 2.0)):
        rounded = round_per_token(x.float()) if activation_range is None else round_to_range(x.float(), -1.5, 2.0)
        y = routes.Int8Rows(layer.stored(), activation_range)(x, None)
        oracle = rounded.double() @ layer.dequantize(torch.float64).t()
        bound = 2e-6 if dtype is torch.float32 else 4e-3
        assert float((y.double() - oracle).norm() / oracle.norm()) <= bound
        if activation_range is None:
            assert bool((y[2] == 0).all())


@pytest.mark.parametrize("scheme", ["8-bit-rows", "8-bit-rows-symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_range_and_a_bias(scheme, dtype, integer_products):
    """Of symmetric weights oneDNN multiplies by the range's scale and adds the bias itself."""
    layer = packed_layer(SCHEMES[scheme])
    run = routes.Int8Rows(layer.stored(), (-1.5, 2.0))
    for M in (1, 5, 40):
        x = torch.randn(M, K).to(dtype)
        oracle = (
            round_to_range(x.float(), -1.5, 2.0).double() @ layer.dequantize(torch.float64).t() + layer.bias.double()
        )
        y = run(x, layer.bias)
        assert y.dtype is dtype
        assert float((y.double() - oracle).norm() / oracle.norm()) <= (2e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("scheme", ["8-bit-rows", "8-bit-rows-symmetric"])
def test_integer_products_stay_near_the_unrounded(scheme, integer_products):
    layer = packed_layer(SCHEMES[scheme])
    for M in (1, 33, 70):
        x = torch.randn(M, K)
        assert error(routes.Int8Rows(layer.stored())(x, layer.bias), layer, x) <= BOUNDS["8-bit integers"]


@DTYPES
def test_bytes_are_the_rounding_of_the_record(dtype):
    x = torch.randn(9, 64).to(dtype)
    x[0], x[1, :3] = 0, torch.tensor([0.5, 1.5, 127.0])  # ties go to the even step
    x[1, 3:] = 0
    for activation_range in (None, (-0.8, 1.9)):
        q, scale, zero = round_to_bytes(x, activation_range)
        expected = round_per_token(x.float()) if activation_range is None else round_to_range(x.float(), -0.8, 1.9)
        torch.testing.assert_close((q.float() - zero) * scale, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(rounded_rows(x, activation_range), ((q.float() - zero) * scale).to(dtype))
    assert round_to_bytes(x).q[1, :3].tolist() == [128, 130, 255]


def test_query_key_and_value_round_their_input_once(monkeypatch):
    calls, plain = [], rounding._steps
    monkeypatch.setattr(rounding, "_steps", lambda *args: calls.append(args) or plain(*args))
    x = torch.randn(2, 3, 64)
    first = round_to_bytes(x.view(-1, 64))
    assert round_to_bytes(x.view(-1, 64)).q is first.q and len(calls) == 1
    x[0, 0, 0] = 100.0  # a change in place is seen
    assert round_to_bytes(x.view(-1, 64)).scale[0] == 100.0 / 127 and len(calls) == 2
    round_to_bytes(x.view(-1, 64), (-1.0, 1.0))
    round_to_bytes(torch.randn(6, 64))
    assert len(calls) == 4
    with torch.inference_mode():  # nothing tells of a change there
        y = torch.randn(2, 2, 64)
        before = round_to_bytes(y.view(-1, 64))
        assert round_to_bytes(y.view(-1, 64)).q is before.q and len(calls) == 5
        y.mul_(2)
        assert torch.equal(round_to_bytes(y.view(-1, 64)).scale, 2 * before.scale)


def test_many_rows_are_rounded_and_multiplied_as_few(monkeypatch, integer_products):
    layer = packed_layer(SCHEMES["8-bit-rows"])
    run, ranged = routes.Int8Rows(layer.stored()), routes.Int8Rows(layer.stored(), (-1.5, 2.0))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(70, K).to(dtype)
        whole = [
            (round_to_bytes(x, span), product(x, layer.bias)) for span, product in ((None, run), ((-1.5, 2.0), ranged))
        ]
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "AT_ONCE", 32)
            patch.setattr(routes, "AT_ONCE", 32)
            for (rounded, y), span, product in zip(whole, (None, (-1.5, 2.0)), (run, ranged), strict=True):
                again = round_to_bytes(x.clone(), span)
                assert torch.equal(again.q, rounded.q) and torch.equal(again.scale, rounded.scale)
                torch.testing.assert_close(product(x.clone(), layer.bias), y)


@needs_bfloat16
def test_bfloat16_is_within_its_bound():
    for scheme in SCHEMES.values():
        layer = packed_layer(scheme)
        for M in (1, 33, 70):
            x = torch.randn(M, K)
            assert error(routes.BFloat16(layer.stored())(x, layer.bias), layer, x) <= BOUNDS["bfloat16"]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dequantizing_for_one_call_is_the_same_weight(scheme, monkeypatch):
    monkeypatch.setattr(routes, "ROWS_AT_ONCE", 80)  # three parts
    layer, x = packed_layer(scheme), torch.randn(4, K)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        assert error(routes.PerCall(layer.stored(), dtype)(x, layer.bias), layer, x) <= bound


def test_some_rows_are_those_of_the_whole_weight():
    for scheme in SCHEMES.values():
        stored = packed_layer(scheme).stored()
        part = stored.weight(slice(32, 80)).dequantize(torch.float32)
        assert torch.equal(part, stored.weight().dequantize(torch.float32)[32:80])


@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@torch.no_grad()
def test_a_tied_head_multiplies_by_the_packed_table(bits, decodes):
    table = PackedEmbedding(96, 256, WeightScheme(bits))
    q = torch.randint(0, 2**bits, (96, 256), dtype=torch.uint8)
    table.fill(q, torch.rand(96, 1) + 0.1, torch.randint(0, 2**bits, (96, 1), dtype=torch.uint8))
    table.prepare(decodes=decodes)
    ids = torch.tensor([[3, 0], [95, 3]])
    assert torch.equal(table(ids), table.dequantize()[ids])
    head = TiedHead(table, None)
    for M in (1, 40):
        x = torch.randn(M, 256)
        oracle = x.double() @ table.dequantize(torch.float64).t()
        assert float((head(x) - oracle).norm() / oracle.norm()) <= 2e-2
    assert head(torch.randn(2, 3, 256, dtype=torch.bfloat16)).shape == (2, 3, 96)


def test_modes(monkeypatch):
    x, layer = torch.randn(20, K), packed_layer(SCHEMES["4-bit"])
    with torch.no_grad():
        monkeypatch.setenv(processor.VARIABLE, "exact")
        layer.prepare()
        assert error(layer(x), layer, x) <= 2e-6
        monkeypatch.setenv(processor.VARIABLE, "reference")
        layer.prepare()
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    monkeypatch.setenv(processor.VARIABLE, "fastest")
    with pytest.raises(ValueError, match="HF_COMPRESS_CPU must be one of"):
        layer.prepare()


@pytest.mark.parametrize("decodes", [False, True])
def test_a_small_layer_keeps_its_weight_for_the_plain_product(decodes):
    layer = PackedLinear(64, 64, WeightScheme(4, 32))
    layer.fill(torch.randint(0, 16, (64, 64), dtype=torch.uint8), torch.rand(2, 64), torch.full((2, 64), 8))
    layer.prepare(decodes=decodes)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert layer.run.name == "float32"
    layer.scales.mul_(2)  # what is stored may change: the weight is made again
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))


def _in_a_worker(layer, x, queue):
    with torch.no_grad():
        queue.put(layer(x).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_worker_runs_it():
    layer, x = packed_layer(SCHEMES["4-bit"]), torch.randn(2, K)
    threads = torch.get_num_threads()
    with torch.no_grad():
        y = layer(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_a_worker, args=(layer, x, queue))
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: what data loaders of PyTorch do as well
        worker.start()
        assert queue.get(timeout=30) == y.tolist()
    finally:
        torch.set_num_threads(threads)
    worker.join()


def test_stored_tells_its_shape():
    layer = packed_layer(SCHEMES["4-bit"])
    stored = layer.stored()
    assert isinstance(stored, Stored) and (stored.out_features, stored.in_features) == (N, K)
    assert (stored.num_groups, stored.group_size, stored.is_8_bit_rows) == (K // 64, 64, False)
