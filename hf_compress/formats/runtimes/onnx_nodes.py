"""The nodes of an ONNX graph that multiply by packed weights, and look up packed rows."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from hf_compress.engines.rounding import LARGEST_INT8, grid_of_range
from hf_compress.formats.named_weight import NamedWeight

MICROSOFT = "com.microsoft"
BLOCKS = 256, 128, 64, 32, 16  # what MatMulNBits takes
INT8_INSIDE = 4  # MatMulNBits' accuracy level: inputs are rounded to 8 bit in blocks
MIDDLE = np.uint8(128)


class Nodes:
    """Adds nodes to a graph, before the one that is being replaced."""

    def __init__(self, graph: ir.Graph):
        self.graph, self.count, self.place = graph, 0, None

    @contextmanager
    def before(self, node: ir.Node) -> Iterator[None]:
        self.place = node
        yield
        self.place = None

    def add(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain)
        self.count += 1
        node.outputs[0].name = f"packed_{kind}_{self.count}"
        self.graph.insert_before(self.place, node)
        return node.outputs[0]

    def constant(self, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array)) if isinstance(array, (np.ndarray, np.generic)) else array
        self.count += 1
        value = ir.Value(name=f"packed_{self.count}", const_value=tensor)
        value.dtype, value.shape = tensor.dtype, tensor.shape
        self.graph.register_initializer(value)
        return value

    def put_in_place(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        value.shape, value.dtype = old.shape, old.dtype
        if old.is_graph_output():
            name, old.name = old.name, f"{old.name}_before"
            value.name = name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def rounded_inputs(nodes: Nodes, x: ir.Value, weight: NamedWeight) -> list[ir.Value]:
    """What all products of `x` by weights of this kind share: x itself, on the grid of its range, or u8 and scales."""
    is_rows = weight.scheme.bits == 8 and weight.num_groups == 1
    if weight.scheme.activation_range is not None:
        scale, zero_point = grid_of_range(*weight.scheme.activation_range)
        grid = nodes.constant(np.float32(scale)), nodes.constant(np.uint8(zero_point))
        return [nodes.add("DequantizeLinear", nodes.add("QuantizeLinear", x, *grid), *grid)]
    if not is_rows:
        return [x]
    largest = nodes.add("ReduceMax", nodes.add("Abs", x), nodes.constant(np.array([-1])), keepdims=1)
    largest = nodes.add("Max", largest, nodes.constant(np.float32(1e-30)))
    scale = nodes.add("Mul", largest, nodes.constant(np.float32(1 / LARGEST_INT8)))
    one, middle = nodes.constant(np.float32(1)), nodes.constant(MIDDLE)
    return [nodes.add("QuantizeLinear", nodes.add("Div", x, scale), one, middle), scale]


def product(nodes: Nodes, inputs: list[ir.Value], weight: NamedWeight) -> ir.Value:
    """x W^T from what `rounded_inputs` gave."""
    if weight.order is not None:
        order = nodes.constant(weight.order.astype(np.int64))
        inputs = [nodes.add("Gather", inputs[0], order, axis=-1), *inputs[1:]]
    if len(inputs) == 2:
        return per_token(nodes, *inputs, weight)
    if weight.is_int8:
        q = nodes.constant(weight.signed().astype(np.int8).T)
        scales = weight.scales[:, 0].astype(np.float32)
        zeros = nodes.constant(np.zeros(len(scales), np.int8))
        dense = nodes.add("DequantizeLinear", q, nodes.constant(scales), zeros, axis=1)
        return nodes.add("MatMul", inputs[0], dense)
    if (block := block_of(weight)) is not None:
        return blocks(nodes, inputs[0], weight, block)
    return nodes.add("MatMul", inputs[0], dequantized(nodes, weight))


def per_token(nodes: Nodes, x: ir.Value, scale: ir.Value, weight: NamedWeight) -> ir.Value:
    """u8 tokens, each with its scale, times 8-bit rows."""
    scales = nodes.constant(weight.scales[:, 0].astype(np.float32))
    if weight.scheme.symmetric:
        operands = (nodes.constant(weight.signed().astype(np.int8).T), nodes.constant(MIDDLE))
    else:
        zeros = nodes.constant(np.ascontiguousarray(weight.zeros[:, 0]))
        operands = (nodes.constant(weight.q.T), nodes.constant(MIDDLE), zeros)
    sums = nodes.add("Cast", nodes.add("MatMulInteger", x, *operands), to=int(ir.DataType.FLOAT))
    return nodes.add("Mul", nodes.add("Mul", sums, scales), scale)


def block_of(weight: NamedWeight) -> int | None:
    """The widest block of MatMulNBits in which one scale and zero point hold; a whole row may end in a part of one."""
    K = weight.q.shape[1]
    if weight.num_groups == 1:
        return next((block for block in BLOCKS if K % block == 0), BLOCKS[-1])
    return next((block for block in BLOCKS if weight.group_size % block == 0), None)


def blocks(nodes: Nodes, x: ir.Value, weight: NamedWeight, block: int) -> ir.Value:
    """MatMulNBits: integers (N, blocks, bytes of a block), scales and zero points a block."""
    (N, K), bits = weight.q.shape, 8 if weight.scheme.bits == 8 else 4
    number = -(-K // block)
    groups = np.minimum(np.arange(number) * block // weight.group_size, weight.num_groups - 1)
    q = np.zeros((N, number * block), np.uint8)
    q[:, :K] = weight.q
    zeros = weight.zeros[:, groups]
    if bits == 4:
        q, zeros = halves(q), halves(np.pad(zeros, ((0, 0), (0, number % 2))))
    inputs = [nodes.constant(q.reshape(N, number, -1)), nodes.constant(weight.scales[:, groups].astype(np.float32))]
    if not weight.scheme.symmetric or weight.scheme.bits < 4:  # without, the middle of 4 or 8 bit is taken
        inputs.append(nodes.constant(zeros))
    return nodes.add("MatMulNBits", x, *inputs, domain=MICROSOFT, K=K, N=N, bits=bits, block_size=block,
                     accuracy_level=INT8_INSIDE)  # fmt: skip


def halves(values: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte, the first one low."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def dequantized(nodes: Nodes, weight: NamedWeight) -> ir.Value:
    """W^T (K, N) of groups of any size."""
    kind = ir.DataType.UINT8 if weight.scheme.bits == 8 else ir.DataType.UINT4
    q, zeros = (nodes.constant(integers(part.T, kind)) for part in (weight.q, weight.zeros))  # (K, N), (G, N)
    scales = nodes.constant(weight.scales.astype(np.float32).T)
    return nodes.add("DequantizeLinear", q, scales, zeros, axis=0, block_size=weight.group_size)


def integers(array: np.ndarray, kind: ir.DataType) -> ir.TensorProtocol:
    if kind == ir.DataType.UINT8:
        return ir.tensor(np.ascontiguousarray(array))
    return ir.Tensor(np.ascontiguousarray(array).astype(kind.numpy()), dtype=kind)


def table_rows(nodes: Nodes, table: NamedWeight, ids: ir.Value) -> ir.Value:
    """Rows of a packed embedding, scaled."""
    (V, D), G = table.q.shape, table.num_groups
    block = table.group_size if G > 1 else max(16, 1 << (D - 1).bit_length())  # one block a row may reach beyond it
    if table.scheme.bits < 8 and block & (block - 1) == 0 and block >= 16:
        q, zeros = (nodes.constant(integers(part, ir.DataType.UINT4)) for part in (table.q, table.zeros))
        scales = nodes.constant(table.scales.astype(np.float32))
        return nodes.add("GatherBlockQuantized", q, ids, scales, zeros, domain=MICROSOFT, block_size=block,
                         gather_axis=0, quantize_axis=1)  # fmt: skip
    shape = (V, G, D // G) if G > 1 else (V, D)
    q = nodes.add("Gather", nodes.constant(table.q.reshape(shape)), ids, axis=0)
    zeros = table.zeros.astype(np.float32).reshape(*shape[:-1], 1)
    scales = table.scales.astype(np.float32).reshape(zeros.shape)
    rows = nodes.add("Cast", q, to=int(ir.DataType.FLOAT))
    if table.scheme.symmetric:
        rows = nodes.add("Sub", rows, nodes.constant(np.float32(table.zeros.flat[0])))
    else:
        rows = nodes.add("Sub", rows, nodes.add("Gather", nodes.constant(zeros), ids, axis=0))
    rows = nodes.add("Mul", rows, nodes.add("Gather", nodes.constant(scales), ids, axis=0))
    if G == 1:
        return rows
    return nodes.add("Reshape", rows, nodes.constant(np.array([0] * len(ids.shape) + [D])))
