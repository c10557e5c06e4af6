"""ONNX folders: what they say in ONNX Runtime is what the packed model says."""

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
from hf_compress.formats.runtimes.agreement import feed  # noqa: E402
from hf_compress.formats.runtimes.onnx_nodes import MICROSOFT, Nodes, product, rounded_inputs, table_rows  # noqa: E402
from hf_compress.formats.runtimes.onnx_session import WITHOUT_OVERFLOW, open_folder  # noqa: E402
from hf_compress.layers.activations import round_per_token, round_to_range  # noqa: E402


def run(weight, x: np.ndarray, *, lookup: bool = False) -> tuple[np.ndarray, list[str]]:
    """x W^T, or the rows x of a table, in ONNX Runtime; and the kinds of nodes that did it."""
    kind = ir.DataType.INT64 if lookup else ir.DataType.FLOAT
    source = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(kind))
    end = ir.node("Identity", [source])
    graph = ir.Graph([source], [], nodes=[end], opset_imports={"": OPSET, MICROSOFT: 1})
    nodes = Nodes(graph)
    with nodes.before(end):
        y = (
            table_rows(nodes, weight, source)
            if lookup
            else product(nodes, rounded_inputs(nodes, source, weight), weight)
        )
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape([None] * (x.ndim + lookup))
    graph.outputs.append(y)
    options = ort.SessionOptions()
    options.add_session_config_entry(*WITHOUT_OVERFLOW)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], [node.op_type for node in graph]


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
    "4-bit-groups-of-8": (dict(bits=4, group_size=8), "DequantizeLinear"),
    "8-bit-groups-of-4": (dict(bits=8, group_size=4, symmetric=True), "DequantizeLinear"),
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
    elif kind == "DequantizeLinear":
        expected, bound = x @ dense.T, 1e-5
    else:  # inputs rounded to 8 bit in blocks: half a step of 1 / 127 each, over sums of random signs
        expected, bound = x @ dense.T, 1e-2
    assert np.abs(found - expected.numpy()).max() <= bound * expected.abs().max().item()


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
                                     dict(embedding_bits=4), dict(embedding_bits=3)])  # fmt: skip
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
@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta-v2", "modernbert", "llama", "bart"])
def test_every_family_leaves(family, tmp_path):
    model = hfc.quantize(with_spread(tiny_model(family)), embedding_bits=8, **ROWS)
    folder = hfc.export(model, tmp_path / "model", format="onnx", tokenizer=tiny_tokenizer())
    outputs = json.loads((folder / "hf_compress.json").read_text(encoding="utf-8"))["agreement"]["outputs"]
    assert all(output["relative_difference"] < 0.05 for output in outputs.values())
