"""x W^T by a packed weight in an ONNX graph. `Way` says which of ONNX Runtime's products it is."""

from enum import Enum

import numpy as np
import onnx_ir as ir

from hf_compress.engines.rounding import LARGEST_INT8, grid_of_range
from hf_compress.formats.named_weight import NamedWeight
from hf_compress.formats.runtimes.onnx_nodes import MICROSOFT, Nodes
from hf_compress.formats.runtimes.onnx_rows import bytes_of, dequantized, halves

BLOCKS = 256, 128, 64, 32, 16  # what MatMulNBits takes
INT8_INSIDE = 4  # MatMulNBits' accuracy level: inputs are rounded to 8 bit in blocks
MIDDLE = np.uint8(128)


class Way(Enum):
    RANGE = "inputs on the grid of a trained range: products of u8 x i8"
    TOKENS = "each token rounded with a scale of its own: products of u8 x i8"
    BLOCKS = "MatMulNBits: inputs rounded to 8 bit in blocks"
    FLOAT = "float products: the weight becomes float32 when the file is opened"


def way_of(weight: NamedWeight, *, keeps_inputs: bool, decodes: bool) -> Way:
    """As the model rounds inputs, where it does.

    Where it does not, `keeps_inputs` says that the runtime must not either, and `decodes` that it multiplies a token at
    a time: then fewer bytes count for more than what unpacking costs.
    """
    scheme, is_rows = weight.scheme, weight.scheme.bits == 8 and weight.num_groups == 1
    if scheme.activation_range is not None:
        return Way.RANGE if weight.is_int8 else Way.FLOAT
    if is_rows and (scheme.activation_bits is not None or not keeps_inputs):
        return Way.TOKENS
    is_free = scheme.activation_bits is None and not keeps_inputs
    return Way.BLOCKS if is_free and decodes and block_of(weight) is not None else Way.FLOAT


def rounded_inputs(nodes: Nodes, x: ir.Value, weight: NamedWeight, way: Way) -> list[ir.Value]:
    """What all products of `x` by weights of this kind share: x, x on its grid, or u8 and the scale of each token."""
    scheme = weight.scheme
    if scheme.activation_range is not None:
        scale, zero_point = grid_of_range(*scheme.activation_range)
        grid = nodes.constant(np.float32(scale)), nodes.constant(np.uint8(zero_point))
        return [nodes.add("DequantizeLinear", nodes.add("QuantizeLinear", x, *grid), *grid)]
    if way is not Way.TOKENS and scheme.activation_bits is None:
        return [x]
    largest = nodes.add("ReduceMax", nodes.add("Abs", x), nodes.constant(np.array([-1])), keepdims=1)
    largest = nodes.add("Max", largest, nodes.constant(np.float32(1e-30)))
    scale = nodes.add("Div", largest, nodes.constant(np.float32(LARGEST_INT8)))
    steps = nodes.add("Div", x, scale)
    if way is not Way.TOKENS:
        return [nodes.add("Mul", nodes.add("Round", steps), scale)]
    return [nodes.add("QuantizeLinear", steps, nodes.constant(np.float32(1)), nodes.constant(MIDDLE)), scale]


def product(nodes: Nodes, inputs: list[ir.Value], weight: NamedWeight, way: Way) -> ir.Value:
    """x W^T from what `rounded_inputs` gave."""
    if way is Way.FLOAT:
        dense = nodes.once(("dense", weight.name), lambda: dequantized(nodes, weight))
        return nodes.add("MatMul", inputs[0], dense)
    if weight.order is not None:
        inputs = [nodes.add("Gather", inputs[0], nodes.constant(weight.order), axis=-1), *inputs[1:]]
    if way is Way.TOKENS:
        return per_token(nodes, *inputs, weight)
    if way is Way.RANGE:
        return nodes.add("MatMul", inputs[0], nodes.once(("bytes", weight.name), lambda: of_bytes(nodes, weight)))
    return blocks(nodes, inputs[0], weight, block_of(weight))


def of_bytes(nodes: Nodes, weight: NamedWeight) -> ir.Value:
    """W^T (K, N) as ONNX Runtime wants it to multiply integers."""
    scales = nodes.constant(weight.scales[:, 0].astype(np.float32))
    zeros = np.zeros(len(weight.q), np.int8) if weight.is_int8 else weight.zeros[:, 0]
    zeros = nodes.own_constant(zeros)
    return nodes.add("DequantizeLinear", transposed(nodes, weight), scales, zeros, axis=1)


def per_token(nodes: Nodes, x: ir.Value, scale: ir.Value, weight: NamedWeight) -> ir.Value:
    """u8 tokens, each with its scale, times 8-bit rows."""
    operands = [transposed(nodes, weight), nodes.constant(MIDDLE)]
    if not weight.scheme.symmetric:
        operands.append(nodes.constant(weight.zeros[:, 0]))
    sums = nodes.cast(nodes.add("MatMulInteger", x, *operands))
    return nodes.add("Mul", nodes.add("Mul", sums, nodes.floats(weight.scales[:, 0])), scale)


def transposed(nodes: Nodes, weight: NamedWeight) -> ir.Value:
    """8-bit integers (K, N), of what is stored as tables have it."""
    stored = nodes.constant(bytes_of(weight))
    return nodes.once(("transposed", stored), lambda: nodes.add("Transpose", stored, perm=[1, 0]))


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
    q, zeros, scales = np.pad(weight.q, ((0, 0), (0, number * block - K))), weight.zeros[:, groups], weight.scales
    if bits == 4:
        q, zeros = halves(q), halves(zeros)
    scales = nodes.floats(scales)
    if number != weight.num_groups:  # stored once, and repeated when the file is opened
        scales = nodes.add("Gather", scales, nodes.constant(groups), axis=1)
    shape = nodes.constant(np.array([N, number, block * bits // 8]))
    inputs = [nodes.add("Reshape", nodes.constant(q), shape), scales]
    if not weight.scheme.symmetric or weight.scheme.bits < 4:  # without, the middle of 4 or 8 bit is taken
        inputs.append(nodes.constant(zeros))
    return nodes.add("MatMulNBits", x, *inputs, domain=MICROSOFT, K=K, N=N, bits=bits, block_size=block,
                     accuracy_level=INT8_INSIDE)  # fmt: skip
