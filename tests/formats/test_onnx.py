"""ONNX folders: what they say in ONNX Runtime is what the packed model says."""

import io
import json

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model
from runtime_models import ROWS, SMALL, every_scheme, run_readme, tiny_tokenizer, trained_ranges, with_spread

import hf_compress as hfc
from hf_compress.formats.named_weight import named_weights

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ir = pytest.importorskip("onnx_ir")

from hf_compress.formats.onnx import OPSET  # noqa: E402
from hf_compress.formats.runtimes import onnx_session  # noqa: E402
from hf_compress.formats.runtimes.agreement import feed  # noqa: E402
from hf_compress.formats.runtimes.onnx_nodes import MICROSOFT, Nodes  # noqa: E402
from hf_compress.formats.runtimes.onnx_products import Way, product, rounded_inputs, way_of  # noqa: E402
from hf_compress.formats.runtimes.onnx_rows import for_several, table_rows  # noqa: E402
from hf_compress.formats.runtimes.onnx_session import WITHOUT_OVERFLOW, open_folder  # noqa: E402
from hf_compress.formats.runtimes.readme import readme  # noqa: E402
from hf_compress.layers.activations import round_per_token, round_to_range  # noqa: E402
from hf_compress.recipe.quantizing import linear_maps  # noqa: E402


def run(weight, x: np.ndarray, *, lookup: bool = False, way: Way | None = None) -> tuple[np.ndarray, list[str]]:
    """x W^T, or the rows x of a table, in ONNX Runtime; and the kinds of nodes that did it."""
    kind = ir.DataType.INT64 if lookup else ir.DataType.FLOAT
    source = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(kind))
    end = ir.node("Identity", [source])
    graph = ir.Graph([source], [], nodes=[end], opset_imports={"": OPSET, MICROSOFT: 1})
    nodes = Nodes(graph)
    with nodes.before(end):
        way = way or way_of(weight, keeps_inputs=False, decodes=True)
        y = (
            table_rows(nodes, weight, source)
            if lookup
            else product(nodes, rounded_inputs(nodes, source, weight, way), weight, way)
        )
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape([None] * (x.ndim + lookup))
    graph.outputs.append(y)
    return opened(graph).run(None, {"x": x})[0], [node.op_type for node in graph]


def packed(K: int = 64, **options):
    """A linear map (24, K) alone, packed."""
    model = tiny_model("bert", num_hidden_layers=1, hidden_size=K, intermediate_size=24, num_attention_heads=2)
    with_spread(model)
    hfc.quantize(model, {"bert.encoder.layer.0.intermediate.dense": options.pop("bits")}, **options)
    weight = next(named_weights(model))
    return weight, model.get_submodule(weight.name).dequantize(torch.float32)


INPUTS = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
PRODUCTS = {  # scheme -> the node that multiplies
    "8-bit-rows": (dict(bits=8, symmetric=True, group_size=-1), "MatMulInteger"),
    "8-bit-rows-with-zeros": (dict(bits=8, group_size=-1), "MatMulInteger"),
    "8-bit-groups": (dict(bits=8, group_size=32), "MatMulNBits"),
    "8-bit-groups-symmetric": (dict(bits=8, group_size=16, symmetric=True), "MatMulNBits"),
    "4-bit-groups": (dict(bits=4, group_size=32), "MatMulNBits"),
    "4-bit-symmetric": (dict(bits=4, group_size=64, symmetric=True), "MatMulNBits"),
    "4-bit-rows-of-72": (dict(bits=4, group_size=-1, K=72), "MatMulNBits"),
    "3-bit": (dict(bits=3, group_size=16), "MatMulNBits"),
    "2-bit-symmetric": (dict(bits=2, group_size=16, symmetric=True), "MatMulNBits"),
    "4-bit-groups-of-8": (dict(bits=4, group_size=8), "MatMul"),
    "8-bit-groups-of-4": (dict(bits=8, group_size=4, symmetric=True), "MatMul"),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_is_that_of_the_packed_weight(case):
    options, kind = PRODUCTS[case]
    weight, dense = packed(**options)
    x = INPUTS if options.get("K") is None else torch.cat([INPUTS, INPUTS[..., :8]], -1)
    found, kinds = run(weight, x.numpy())
    assert kind in kinds
    if kind == "MatMulInteger":  # the same integers, so only sums in another order
        expected, bound = round_per_token(x) @ dense.T, 1e-5
    elif kind == "MatMul":
        expected, bound = x @ dense.T, 1e-5
    else:  # inputs rounded to 8 bit in blocks: half a step of 1 / 127 each, over sums of random signs
        expected, bound = x @ dense.T, 1e-2
    assert np.abs(found - expected.numpy()).max() <= bound * expected.abs().max().item()


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_float_product_keeps_its_inputs(case):
    """What one input of 50 beside others of 1 loses by rounding would be seen here."""
    weight, dense = packed(**PRODUCTS[case][0])
    x = torch.cat([INPUTS, INPUTS[..., :8]], -1)[..., : weight.q.shape[1]].clone()
    x[..., 3] = 50
    found, kinds = run(weight, x.numpy(), way=Way.FLOAT)
    expected = (x.double() @ dense.double().T).numpy()
    assert kinds.count("MatMul") == 1 and "QuantizeLinear" not in kinds
    assert np.abs(found - expected).max() <= 1e-6 * 50 * np.abs(dense.numpy()).max() * x.shape[-1] ** 0.5


def test_weights_are_multiplied_by_as_the_model_rounds_its_inputs():
    def way(keeps_inputs=False, decodes=False, activation_range=None, **options):
        weight, _ = packed(**options)
        scheme = weight.scheme.__class__(**{**vars(weight.scheme), "activation_range": activation_range})
        return way_of(
            weight.__class__(**{**vars(weight), "scheme": scheme}), keeps_inputs=keeps_inputs, decodes=decodes
        )

    rounded, groups = dict(activation_bits=8), dict(bits=4, group_size=32)
    assert way(**ROWS) is Way.TOKENS and way(keeps_inputs=True, **ROWS) is Way.FLOAT
    for keeps_inputs in (True, False):  # rounding of each token, or by a range, is part of such a model
        assert way(keeps_inputs, **ROWS, **rounded) is Way.TOKENS
        assert way(keeps_inputs, activation_range=(-1.0, 1.0), **ROWS, **rounded) is Way.RANGE
        assert way(keeps_inputs, decodes=True, **groups, **rounded) is Way.FLOAT
    assert way(**groups) is Way.FLOAT and way(decodes=True, **groups) is Way.BLOCKS
    assert way(keeps_inputs=True, decodes=True, **groups) is Way.FLOAT


@pytest.mark.parametrize("options", [dict(bits=4, group_size=32), dict(bits=8, group_size=16), dict(bits=3)])
def test_each_token_is_rounded_where_the_model_rounds_it(options):
    """Groups as well as rows, which alone have products of integers."""
    weight, dense = packed(activation_bits=8, **options)
    x = INPUTS.clone()
    x[..., 3] = 50  # a step of 0.4 for all others
    found, kinds = run(weight, x.numpy())
    expected = (round_per_token(x) @ dense.T).numpy()
    assert "Round" in kinds or "MatMulInteger" in kinds
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs((x @ dense.T).numpy() - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("options", [dict(bits=8, embedding_bits=8, symmetric=True), dict(bits=4, embedding_bits=4)])
def test_what_is_used_twice_is_stored_once(options):
    """A layer that is run twice, and a head that is tied to the table of tokens."""
    model = hfc.quantize(tiny_model("bert", hidden_size=64, **SMALL), group_size=-1, **options)
    table = next(weight for weight in named_weights(model) if weight.is_table and len(weight.q) == 64)
    source = ir.Value(name="x", shape=ir.Shape((2, 3, 64)), type=ir.TensorType(ir.DataType.FLOAT))
    ids = ir.Value(name="ids", shape=ir.Shape((2, 3)), type=ir.TensorType(ir.DataType.INT64))
    end = ir.node("Identity", [source])
    nodes = Nodes(ir.Graph([source, ids], [], nodes=[end], opset_imports={"": OPSET, MICROSOFT: 1}))
    with nodes.before(end):
        table_rows(nodes, table, ids)
        for way in (Way.TOKENS, Way.FLOAT, Way.FLOAT) if table.scheme.bits == 8 else (Way.BLOCKS, Way.FLOAT, Way.FLOAT):
            product(nodes, rounded_inputs(nodes, source, table, way), table, way)
    sizes = [value.const_value.nbytes for value in nodes.graph.initializers.values()]
    assert sum(size >= table.q.size // 2 for size in sizes) == 1


@pytest.mark.parametrize("way", [Way.RANGE, Way.TOKENS, Way.FLOAT])
def test_a_weight_of_several_products_is_one_constant(way):
    """ALBERT's layers: ONNX Runtime fails at int8 that two products share, so such a weight is uint8."""
    weight, dense = packed(**ROWS)
    weight = for_several(weight.__class__(**{**vars(weight), "q": np.tile(weight.q, (3, 1))[:64],
                                             "scales": np.tile(weight.scales, (3, 1))[:64],
                                             "zeros": np.tile(weight.zeros, (3, 1))[:64]}))  # fmt: skip
    if way is Way.RANGE:
        scheme = weight.scheme.__class__(**{**vars(weight.scheme), "activation_bits": 8, "activation_range": (-3, 3)})
        weight = weight.__class__(**{**vars(weight), "scheme": scheme})
    expected, dense = INPUTS.clamp(-2, 2), torch.cat([dense] * 3)[:64]
    for _ in range(2):
        x = expected
        expected = {Way.RANGE: lambda x: round_to_range(x, -3, 3), Way.TOKENS: round_per_token}.get(way, lambda x: x)(x)
        expected = (expected @ dense.T).clamp(-2, 2)
    found, graph = run_twice(weight, INPUTS.clamp(-2, 2).numpy(), way)
    assert sum(value.const_value.nbytes >= weight.q.size for value in graph.initializers.values()) == 1
    assert np.abs(found - expected.numpy()).mean() <= 2e-2 * expected.abs().mean().item()  # ties fall either way


def run_twice(weight, x: np.ndarray, way: Way) -> tuple[np.ndarray, object]:
    source = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    end = ir.node("Identity", [source])
    graph = ir.Graph([source], [], nodes=[end], opset_imports={"": OPSET, MICROSOFT: 1})
    nodes, y = Nodes(graph), source
    with nodes.before(end):
        for _ in range(2):
            y = product(nodes, rounded_inputs(nodes, y, weight, way), weight, way)
            y = nodes.add("Clip", y, nodes.constant(np.float32(-2)), nodes.constant(np.float32(2)))
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape([None] * x.ndim)
    graph.outputs.append(y)
    return opened(graph).run(None, {"x": x})[0], graph


def opened(graph) -> "ort.InferenceSession":
    options = ort.SessionOptions()
    options.add_session_config_entry(*WITHOUT_OVERFLOW)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("range_", [(-2.0, 1.5), (0.0, 2.0)], ids=["both-sides", "positive"])
def test_a_trained_range_is_kept(range_):
    weight, dense = packed(**ROWS)
    scheme = weight.scheme.__class__(**{**vars(weight.scheme), "activation_bits": 8, "activation_range": range_})
    found, kinds = run(weight.__class__(**{**vars(weight), "scheme": scheme}), INPUTS.numpy())
    expected = (round_to_range(INPUTS, *range_) @ dense.T).numpy()
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("DequantizeLinear") == 2
    # a value at the middle of two steps may fall to the other one
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()


def test_act_order_takes_the_inputs_in_its_order():
    model = every_scheme()
    weights = [weight for weight in named_weights(model) if weight.order is not None]
    for weight in weights:
        x = torch.randn(2, 3, weight.q.shape[1], generator=torch.Generator().manual_seed(1))
        expected = (x @ model.get_submodule(weight.name).dequantize(torch.float32).T).numpy()
        assert np.abs(run(weight, x.numpy())[0] - expected).max() <= 1e-2 * np.abs(expected).max()
    assert len(weights) == 4


@pytest.mark.parametrize("options", [dict(embedding_bits=8), dict(embedding_bits=8, symmetric=True),
                                     dict(embedding_bits=4), dict(embedding_bits=3),
                                     dict(embedding_bits=4, group_size=8), dict(embedding_bits=2, group_size=8),
                                     dict(embedding_bits=8, group_size=8)])  # fmt: skip
def test_rows_of_a_table_are_ours(options):
    model = hfc.quantize(tiny_model("bert", **SMALL), bits=8, **options)
    ids = np.array([[3, 0, 63], [7, 7, 1]])
    for weight in named_weights(model):
        if weight.is_table and len(weight.q) == 64:
            expected = model.get_submodule(weight.name).dequantize(torch.float32)[torch.from_numpy(ids)]
            np.testing.assert_allclose(run(weight, ids, lookup=True)[0], expected.numpy(), rtol=1e-6)


def test_a_classifier_with_trained_ranges_leaves_whole(tmp_path, monkeypatch, capsys):
    model = trained_ranges(with_spread(tiny_model("bert", id2label={0: "bad", 1: "good"}, **SMALL)))
    folder = hfc.export(model, tmp_path / "model", format="onnx", tokenizer=tiny_tokenizer())
    outputs = json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))["agreement"]["outputs"]
    assert outputs["logits"]["relative_difference"] < 0.01 and outputs["logits"]["same_class"] >= 0.98
    graph = ir.load(folder / "model.onnx").graph
    assert not any(node.metadata_props for node in graph)  # where in which file of this machine each node came from
    kinds = [node.op_type for node in graph]
    assert kinds.count("QuantizeLinear") == 2 * 4  # q, k and v read one tensor; output; up; down
    assert kinds.count("LayerNormalization") == 5
    for node in graph:  # what ONNX Runtime would fuse into a slow kernel
        if node.op_type == "LayerNormalization":
            assert node.inputs[0].producer().op_type == "Sum"
    opened, batch = open_folder(folder, threads=1), tiny_batch(model)
    found = torch.from_numpy(opened.run(feed(opened, batch))["logits"])
    torch.testing.assert_close(found, model(**batch).logits, atol=0.02, rtol=0.02)
    run_readme(folder, monkeypatch)
    tokens = tiny_tokenizer()(["A fine film.", "Two hours that I shall never get back."], padding=True,
                              return_tensors="pt")  # fmt: skip
    expected = model(**tokens).logits.argmax(-1)
    assert capsys.readouterr().out.strip() == str([("bad", "good")[i] for i in expected])


@pytest.mark.parametrize("is_static", [True, False])
def test_heads_multiply_integers_too(is_static, tmp_path):
    """ONNX Runtime makes a Gemm of a product and a bias of rank 2, and unpacks its weight in every run."""
    model = with_spread(tiny_model("bert", **SMALL))
    bits = linear_maps(model, 8)
    for name in bits:  # the exporter leaves out biases that are zero
        torch.nn.init.normal_(model.get_submodule(name).bias)
    data = [tiny_batch(model, batch=8, length=20, seed=seed) for seed in range(2)]
    ranges = dict(static_activations=True, calibration=data) if is_static else {}
    packed = hfc.quantize(model, bits, symmetric=True, group_size=-1, activation_bits=8, **ranges)
    folder = hfc.export(packed, tmp_path / "model", format="onnx", tokenizer=tiny_tokenizer())
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert sum(kind.startswith("MatMulInteger") for kind in kinds) == len(bits) == 2 * 6 + 2
    assert not any("Gemm" in kind or kind == "DequantizeLinear" for kind in kinds)


@pytest.mark.parametrize("told", ["flags : avx2 avx512_vnni", "flags : avx2", None])
def test_slow_products_are_asked_for_only_where_fast_ones_overflow(told, tmp_path, monkeypatch):
    asked = []

    class Options(ort.SessionOptions):
        def add_session_config_entry(self, *entry):
            asked.append(entry)

    code = readme(tiny_model("bert"), "onnx", None).split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **options: 1 / 0)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.exists", lambda path: told is not None)
        patch.setattr("builtins.open", lambda *args: io.StringIO(told))
        with pytest.raises(ZeroDivisionError):
            exec(code, {})
    overflows = told is None or "vnni" not in told
    assert asked == [WITHOUT_OVERFLOW] * overflows
    monkeypatch.setattr(onnx_session, "has_int8", lambda: not overflows)
    with pytest.raises(ZeroDivisionError):
        onnx_session.session(b"")
    assert asked == [WITHOUT_OVERFLOW] * 2 * overflows


@pytest.mark.long
def test_a_decoder_reads_and_goes_on(tmp_path, monkeypatch):
    model = hfc.quantize(with_spread(tiny_model("gpt2", n_layer=2)), bits=4, group_size=16, embedding_bits=8)
    folder = hfc.export(model, tmp_path / "model", format="onnx", tokenizer=tiny_tokenizer())
    scope = run_readme(folder, monkeypatch)
    tokens = torch.from_numpy(scope["inputs"]["input_ids"][:1])
    with torch.no_grad():
        for _ in range(20):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert np.mean(np.array(scope["tokens"]) == tokens[0].numpy()) > 0.9  # near ties may fall to the other side


@pytest.mark.long
@pytest.mark.parametrize("family", ["roberta", "albert", "distilbert", "deberta-v2", "modernbert", "llama", "bart"])
def test_every_family_leaves(family, tmp_path):
    model = hfc.quantize(with_spread(tiny_model(family)), embedding_bits=8, **ROWS)
    folder = hfc.export(model, tmp_path / "model", format="onnx", tokenizer=tiny_tokenizer())
    outputs = json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))["agreement"]["outputs"]
    assert all(output["relative_difference"] < 0.05 for output in outputs.values())
