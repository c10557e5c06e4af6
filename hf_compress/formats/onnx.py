"""ONNX Runtime: the integers of a packed model in an ONNX graph, made by transformers' exporter.

    8-bit rows with a trained range     QuantizeLinear, DequantizeLinear around int8 weights: ONNX Runtime fuses them
    other 8-bit rows                    each token its own scale: MatMulInteger; of embedders, whose vectors that would
                                        change, float products
    groups and 2, 3, 4 bit              float products of weights that are unpacked when the file is opened; of decoders
                                        MatMulNBits, which rounds inputs to 8 bit in blocks; 2 and 3 bit travel in 4
    embedding                           Gather of the integers, then scaled; GatherBlockQuantized below 8 bit

Tested with onnxruntime 1.31.1, onnx 1.23.2, onnxscript 0.7.2, transformers 5.23.0, torch 2.13.0.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import onnxscript  # noqa: F401  the exporter wants it, and says so later than here
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import ExportFormat, ExportQuantizer, OnnxConfig, OnnxExporter

from hf_compress.formats.named_weight import NamedWeight, named_weights
from hf_compress.formats.runtimes.agreement import Session
from hf_compress.formats.runtimes.folder import write_folder
from hf_compress.formats.runtimes.onnx_nodes import MICROSOFT, Nodes
from hf_compress.formats.runtimes.onnx_products import product, rounded_inputs, way_of
from hf_compress.formats.runtimes.onnx_rows import for_several, table_rows
from hf_compress.formats.runtimes.onnx_session import session
from hf_compress.formats.runtimes.readme import decodes, is_embedder
from hf_compress.formats.runtimes.traced import Traced, graph, traced

OPSET = 21
PRODUCTS = "MatMul", "Gemm"


def write(model: PreTrainedModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None,
          calibration: Iterable | None, bound: float | None = None) -> None:  # fmt: skip
    write_folder(model, folder, OnnxExport, tokenizer, calibration, bound)


class PackedWeights(ExportQuantizer):
    """Puts the integers of `weights` where their dequantized copies were traced."""

    supported_formats = (ExportFormat.ONNX,)
    required_packages = ("onnx_ir",)

    def __init__(self, weights: dict[str, NamedWeight], traced: Traced, *, keeps_inputs: bool, decodes: bool):
        super().__init__()
        self.weights, self.traced = weights, traced
        self.ways = {name: way_of(w, keeps_inputs=keeps_inputs, decodes=decodes) for name, w in weights.items()}
        self.products: dict[str, ir.Value] = {}  # module -> what multiplying by it gives
        self.found: set[str] = set()
        self.rounded: dict[tuple, list[ir.Value]] = {}

    def quantize(self, model: ir.Model, sample_inputs: dict, export_format: ExportFormat) -> ir.Model:
        self.nodes = Nodes(model.graph)
        readers = []
        for value in list(model.graph.initializers.values()):
            array = None if value.const_value is None else value.const_value.numpy()
            found = None if array is None else self.traced.find(array)
            if found is not None:
                readers += [(node, port, *found) for node, port in value.uses()]
        products = Counter(name for node, _, name, _ in readers if node.op_type in PRODUCTS)
        for name in [name for name, number in products.items() if number > 1]:  # ALBERT's layers
            self.weights[name] = for_several(self.weights[name])
        for reader in readers:
            self.replace(*reader)
        keep_layer_norms(model)
        RemoveUnusedNodesPass()(model)
        for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            model.graph.initializers.pop(name)
        model.opset_imports.setdefault(MICROSOFT, 1)
        model.graph.sort()  # what is shared stands before its first reader
        return model

    def replace(self, node: ir.Node, port: int, name: str, is_transposed: bool) -> None:
        """One reader of a weight. Readers that neither multiply nor look up keep the float numbers."""
        weight, kind = self.weights[name], node.op_type
        transposes = kind == "Gemm" and node.attributes.get_int("transB", 0) == 1
        with self.nodes.before(node):
            if kind in PRODUCTS and port == 1 and is_transposed != transposes:  # x W^T
                new = self.products[name] = self.multiply(node.inputs[0], weight)
                if kind == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
                    # of an Add ONNX Runtime makes a Gemm again, which multiplies floats: weights unpacked each time
                    new = self.nodes.add("Sum", new, node.inputs[2])
            elif kind == "Gather" and port == 0 and not is_transposed and weight.is_table:
                new = table_rows(self.nodes, weight, node.inputs[1])
            else:
                return
        self.found.add(name)
        self.nodes.put_in_place(node, new)

    def multiply(self, x: ir.Value, weight: NamedWeight) -> ir.Value:
        way, scheme = self.ways[weight.name], weight.scheme
        place = x, way, scheme.activation_bits, scheme.activation_range
        if place not in self.rounded:
            self.rounded[place] = rounded_inputs(self.nodes, x, weight, way)
        return product(self.nodes, self.rounded[place], weight, way)


def keep_layer_norms(model: ir.Model) -> None:
    """Sum instead of Add before LayerNormalization.

    ONNX Runtime else fuses the two into a SkipLayerNormalization, whose CPU kernel takes about three times as long: a
    third of the time of a small model.
    """
    for node in model.graph:
        if node.op_type == "Add" and any(use.node.op_type == "LayerNormalization" for use in node.outputs[0].uses()):
            node.op_type = "Sum"


def forget_source(program: ir.Model) -> None:
    """Changes `program`: nodes forget the lines of Python they came from, most of the file, with local paths."""
    for node in ir.traversal.RecursiveGraphIterator(program.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


class OnnxExport:
    """`model` as an ONNX graph. `inputs` are a tokenizer's, None where there is none."""

    format = "onnx"
    tested = {"onnxruntime": "1.31.1", "onnx": "1.23.2", "onnxscript": "0.7.2", "transformers": "5.23.0"}

    def __init__(self, model: PreTrainedModel, inputs: list[str] | None):
        weights = {weight.name: weight for weight in named_weights(model)}
        trace = traced(model)
        ways = dict(keeps_inputs=is_embedder(model), decodes=decodes(model))
        quantizer = PackedWeights(weights, trace, **ways) if weights else None
        config = OnnxConfig(dynamic=True, opset_version=OPSET, quantizer=quantizer)
        self.exported = graph(OnnxExporter(), trace.model, inputs, config)
        forget_source(self.exported.program)
        self.products = quantizer.products if quantizer else {}
        self.folded = sorted(weights.keys() - quantizer.found) if quantizer else []

    def save(self, folder: Path) -> None:
        self.exported.save_pretrained(folder)

    def session(self, *, watch: bool = False) -> Session:
        """What the file says; with `watch` also each product, under its module's name."""
        program, watched = self.exported.program, self.products if watch else {}
        names = {value.name: name for name, value in watched.items()}
        program.graph.outputs.extend(watched.values())
        try:
            serialized = ir.to_proto(program).SerializeToString()
        finally:
            for value in watched.values():
                program.graph.outputs.remove(value)
        loaded = session(serialized)
        return Session(
            loaded.inputs, lambda fed: {names.get(name, name): value for name, value in loaded.run(fed).items()}
        )

    def fast_session(self) -> None:
        """None: the option that keeps products exact costs nothing where a processor does not need it."""
