"""Packed rows as float32 in an ONNX graph: whole weights, and what is looked up in a table.

Integers are stored once, as (N, K): int8 for 8-bit rows without zero points, else uint8, below 8 bit two to a byte.
What is made of constants alone, ONNX Runtime makes once, when it opens the file.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from hf_compress.formats.named_weight import NamedWeight
from hf_compress.formats.runtimes.onnx_nodes import MICROSOFT, Nodes


def bytes_of(weight: NamedWeight) -> np.ndarray:
    """The stored integers (N, K), of fewer than 8 bit (N, K / 2)."""
    if weight.is_int8:
        return weight.signed().astype(np.int8)
    return weight.q if weight.scheme.bits == 8 else halves(weight.q)


def for_several(weight: NamedWeight) -> NamedWeight:
    """The same numbers for several products.

    Without VNNI ONNX Runtime makes uint8 of int8, and fails at a constant that has become one: this one is uint8.
    """
    return replace(weight, scheme=replace(weight.scheme, symmetric=False)) if weight.is_int8 else weight


def halves(values: np.ndarray) -> np.ndarray:
    """(N, K) of 4 bit as (N, K / 2): two values a byte, the first one low; rows of odd length end in a zero."""
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return values[:, 0::2] | (values[:, 1::2] << 4)


def dequantized(nodes: Nodes, weight: NamedWeight) -> ir.Value:
    """W^T (K, N) in float32, of constants alone."""
    rows = scaled_rows(nodes, weight)
    if weight.order is not None:
        rows = nodes.add("Gather", rows, nodes.constant(np.argsort(weight.order)), axis=1)
    return nodes.add("Transpose", rows, perm=[1, 0])


def table_rows(nodes: Nodes, table: NamedWeight, ids: ir.Value) -> ir.Value:
    """Rows (*ids, D) of a packed embedding, float32."""
    (_, D), G = table.q.shape, table.num_groups
    block = table.group_size if G > 1 else max(16, 1 << (D - 1).bit_length())  # one block a row may reach beyond it
    is_block = block & (block - 1) == 0 and block >= 16 and D % 2 == 0
    if table.scheme.bits == 8 or not is_block:
        return scaled_rows(nodes, table, ids)
    q, zeros = (nodes.constant(halves(part)) for part in (table.q, table.zeros))
    return nodes.add("GatherBlockQuantized", q, ids, nodes.floats(table.scales), zeros, domain=MICROSOFT, bits=4,
                     block_size=block, gather_axis=0, quantize_axis=1)  # fmt: skip


def scaled_rows(nodes: Nodes, weight: NamedWeight, ids: ir.Value | None = None) -> ir.Value:
    """scale * (q - zero): all rows (N, K), or those of `ids` (*ids, K)."""
    (_, K), G, rank = weight.q.shape, weight.num_groups, 1 if ids is None else len(ids.shape)

    def rows(value: ir.Value) -> ir.Value:
        return value if ids is None else nodes.add("Gather", value, ids, axis=0)

    def in_groups(value: ir.Value, size: int) -> ir.Value:  # (*ids, G * size) -> (*ids, G, size)
        return reshaped(nodes, value, rank, G, size) if G > 1 else value

    def integers(array: np.ndarray) -> ir.Value:
        if weight.scheme.bits == 8:
            return nodes.cast(rows(nodes.constant(array)))
        return nodes.cast(apart(nodes, rows(nodes.constant(halves(array))), rank, array.shape[1]))

    if weight.is_int8:
        values = nodes.cast(rows(nodes.constant(bytes_of(weight))))
    elif weight.scheme.symmetric:
        middle = nodes.constant(np.float32(weight.zeros.flat[0]))
        values = in_groups(nodes.add("Sub", integers(weight.q), middle), K // G)
    else:
        values = in_groups(integers(weight.q), K // G)
        values = nodes.add("Sub", values, in_groups(integers(weight.zeros), 1))
    values = nodes.add("Mul", values, in_groups(rows(nodes.floats(weight.scales)), 1))
    return reshaped(nodes, values, rank, K) if G > 1 else values


def apart(nodes: Nodes, stored: ir.Value, rank: int, width: int) -> ir.Value:
    """(*rows, bytes) -> (*rows, width): what `halves` put together."""
    low = nodes.add("BitwiseAnd", stored, nodes.constant(np.uint8(15)))
    high = nodes.add("BitShift", stored, nodes.constant(np.uint8(4)), direction="RIGHT")
    last = nodes.constant(np.array([-1]))
    pairs = nodes.add("Concat", nodes.add("Unsqueeze", low, last), nodes.add("Unsqueeze", high, last), axis=-1)
    values = reshaped(nodes, pairs, rank, width + width % 2)
    if width % 2 == 0:
        return values
    return nodes.add("Slice", values, nodes.constant(np.array([0])), nodes.constant(np.array([width])), last)


def reshaped(nodes: Nodes, value: ir.Value, rank: int, *sizes: int) -> ir.Value:
    """The first `rank` sizes stay."""
    return nodes.add("Reshape", value, nodes.constant(np.array([0] * rank + list(sizes))))
