"""OpenVINO: the integers of a packed model in an OpenVINO graph, made by transformers' exporter.

    linear      Constant i8 (N, K) -> Convert -> Multiply (N, 1) -> MatMul          8 bit, symmetric
                Constant u8 / u4 -> Convert -> Subtract -> Multiply [-> Reshape]    zero points, groups
                2 and 3 bit travel in 4
    embedding   Gather of the same nodes, which the plugin gathers as integers
    inputs      trained range: FakeQuantize of 256 levels, one for all readers of a tensor, and products of u8 x i8;
                each token's own range, where the model rounds so: a few nodes;
                else rounded as they come, `DYNAMIC_QUANTIZATION_GROUP_SIZE` columns together

Tested with openvino 2026.4.1, transformers 5.23.0, torch 2.13.0.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import ExportFormat, ExportQuantizer, OpenVINOConfig, OpenVINOExporter

from hf_compress.engines.processor import has_int8
from hf_compress.engines.rounding import LARGEST_INT8, LEVELS, grid_of_range
from hf_compress.formats.named_weight import NamedWeight, named_weights
from hf_compress.formats.runtimes.agreement import Session
from hf_compress.formats.runtimes.folder import write_folder
from hf_compress.formats.runtimes.openvino_session import RUN_OPTIONS, WITHOUT_OVERFLOW, session
from hf_compress.formats.runtimes.traced import Traced, graph, traced

DYNAMIC_GROUPS = 64, 32, 16  # the first is the fastest


class PackedWeights(ExportQuantizer):
    """Puts the integers of `weights` where their dequantized copies were traced."""

    supported_formats = (ExportFormat.OPENVINO,)
    required_packages = ("openvino",)

    def __init__(self, weights: dict[str, NamedWeight], traced: Traced):
        super().__init__()
        self.weights, self.traced = weights, traced
        self.products: dict[str, str] = {}  # module -> name of the node that multiplies by it
        self.nodes: dict[str, ov.Node] = {}
        self.rounded: dict[tuple, ov.Node] = {}

    def quantize(self, model: ov.Model, sample_inputs: dict, export_format: ExportFormat) -> ov.Model:
        constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
        for constant in constants:
            is_matrix = constant.get_element_type() == ov.Type.f32 and len(constant.get_output_shape(0)) == 2
            found = self.traced.find(constant.get_data()) if is_matrix else None
            if found is not None:
                for reader in list(constant.output(0).get_target_inputs()):
                    self.replace(reader, *found)
        model.validate_nodes_and_infer_types()
        return model

    def replace(self, reader: ov.Input, name: str, is_transposed: bool) -> None:
        weight, node = self.weights[name], reader.get_node()
        if name not in self.nodes:
            self.nodes[name] = weight_nodes(weight)
        stored = self.nodes[name]
        multiplies = node.get_type_name() == "MatMul" and reader.get_index() == 1
        if multiplies and node.get_attributes()["transpose_b"] != is_transposed:  # x W^T
            product = op.matmul(self.inputs(node.input_value(0), weight), stored, False, True)
            product.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(product.output(0))
            self.products[name] = node.get_friendly_name()
            return
        if weight.order is not None:
            stored = op.gather(stored, constant(np.argsort(weight.order)), constant(np.array(1)))
        if is_transposed:
            stored = op.transpose(stored, constant(np.array([1, 0])))
        reader.replace_source_output(stored.output(0))

    def inputs(self, source: ov.Output, weight: NamedWeight) -> ov.Output:
        """The inputs of a product: rounded where the model rounds them, in the order of the columns."""
        range_ = weight.scheme.activation_range
        place = source.get_node().get_friendly_name(), source.get_index(), range_
        if weight.scheme.activation_bits is not None:
            if place not in self.rounded:
                self.rounded[place] = round_tokens(source) if range_ is None else fake_quantize(source, *range_)
            source = self.rounded[place].output(0)
        if weight.order is not None:
            source = op.gather(source, constant(weight.order), constant(np.array(-1))).output(0)
        return source


def constant(values: np.ndarray, kind: ov.Type | None = None) -> ov.Node:
    """A constant that owns its values; u4 and i4 are packed by OpenVINO, two to a byte."""
    values = np.ascontiguousarray(values)
    return op.constant(values, dtype=kind) if kind else op.constant(values)


def weight_nodes(weight: NamedWeight) -> ov.Node:
    """Nodes that give W (N, K), float32, from the stored integers."""
    (N, K), G = weight.q.shape, weight.num_groups
    is_odd = weight.group_size % 2 == 1  # rows of an odd number of u4 are multiplied wrongly
    is_wide = weight.scheme.bits == 8 or is_odd
    shape, of_groups = ((N, G, K // G), (N, G, 1)) if G > 1 else ((N, K), (N, 1))
    scales = weight.scales.reshape(of_groups)
    if G == 1 and not weight.is_table:  # a scale a row takes little room, and products of integers want float32
        scales = scales.astype(np.float32)
    number = "f16" if scales.dtype == np.float16 else "f32"  # the plugin computes in float32, whichever is written
    if weight.scheme.symmetric:  # signed and without zero points: what products of integers need
        values = weight.signed().astype(np.int8).reshape(shape)
        centred = op.convert(constant(values, ov.Type.i8 if is_wide else ov.Type.i4), number)
    else:
        kind = ov.Type.u8 if is_wide else ov.Type.u4
        zeros = op.convert(constant(weight.zeros.reshape(of_groups), kind), number)
        centred = op.subtract(op.convert(constant(weight.q.reshape(shape), kind), number), zeros)
    product = op.multiply(centred, constant(scales))
    product = op.reshape(product, constant(np.array([N, K])), special_zero=False) if G > 1 else product
    product = op.convert(product, "f32") if number == "f16" else product
    product.set_friendly_name(f"{weight.name}.weight")
    return product


def fake_quantize(source: ov.Output, low: float, high: float) -> ov.Node:
    """256 levels over the range, moved so that zero is one of them, as `round_to_range` has it."""
    scale, zero_point = grid_of_range(low, high)
    low, high = (constant(np.float32(end * scale)) for end in (-zero_point, LEVELS - zero_point))
    return op.fake_quantize(source, low, high, low, high, LEVELS + 1)


def round_tokens(source: ov.Output) -> ov.Node:
    """Each token on the grid of its own largest value, as `round_per_token` has it."""
    largest = op.reduce_max(op.abs(source), constant(np.array([-1])), keep_dims=True)
    scale = op.maximum(op.divide(largest, constant(np.float32(LARGEST_INT8))), constant(np.float32(1e-30)))
    return op.multiply(op.round(op.divide(source, scale), "half_to_even"), scale)


def dynamic_group(weights: dict[str, NamedWeight]) -> int:
    """`DYNAMIC_QUANTIZATION_GROUP_SIZE`: columns of an input that share a scale; 0 where no layer rounds as they come.

    A group wider than the weight's, or than K, would leave float32 products, at twice the time.
    """
    rounding = [w for w in weights.values() if not w.is_table and w.scheme.activation_range is None]

    def fits(weight: NamedWeight, size: int) -> bool:
        return weight.group_size % size == 0 if weight.num_groups > 1 else size <= weight.q.shape[1]

    return next((size for size in DYNAMIC_GROUPS if rounding and all(fits(w, size) for w in rounding)), 0)


def write(model: PreTrainedModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None,
          calibration: Iterable | None, bound: float | None = None) -> None:  # fmt: skip
    write_folder(model, folder, OpenVINOExport, tokenizer, calibration, bound)


class OpenVINOExport:
    """`model` as an OpenVINO graph. `inputs` are a tokenizer's, None where there is none."""

    format = "openvino"
    tested = {"openvino": "2026.4.1", "transformers": "5.23.0"}

    def __init__(self, model: PreTrainedModel, inputs: list[str] | None):
        weights = {weight.name: weight for weight in named_weights(model)}
        trace = traced(model)
        quantizer = PackedWeights(weights, trace) if weights else None
        config = OpenVINOConfig(dynamic=True, quantizer=quantizer)
        self.exported = graph(OpenVINOExporter(), trace.model, inputs, config)
        self.products = quantizer.products if quantizer else {}
        self.has_ranges = any(weight.scheme.activation_range is not None for weight in weights.values())
        self.folded = sorted(weights.keys() - quantizer.nodes.keys()) if quantizer else []
        # the CPU plugin reads this option from the file, unlike INFERENCE_PRECISION_HINT
        group = str(dynamic_group(weights))
        self.exported.program.set_rt_info(group, ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])

    def save(self, folder: Path) -> None:
        self.exported.save_pretrained(folder)

    def session(self, *, watch: bool = False) -> Session:
        """What the file says, on every processor; with `watch` also each product, under its module's name."""
        program = self.exported.program
        if watch:
            program = program.clone()
            for name, node in self.products.items():
                program.add_outputs((node, 0))[0].get_tensor().add_names({name})
        return session(program, WITHOUT_OVERFLOW)

    def fast_session(self) -> Session | None:
        """With products of integers, where there are any and this processor's are exact."""
        return session(self.exported.program, RUN_OPTIONS) if self.has_ranges and has_int8() else None
