"""Nodes and constants that are added to an ONNX graph."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
FLOAT = int(ir.DataType.FLOAT)


class Nodes:
    """Adds nodes to a graph, before the one that is being replaced."""

    def __init__(self, graph: ir.Graph):
        self.graph, self.count, self.place = graph, 0, None
        self.made: dict[tuple, ir.Value] = {}

    @contextmanager
    def before(self, node: ir.Node) -> Iterator[None]:
        self.place = node
        yield
        self.place = None

    def add(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain)
        self.count += 1
        node.outputs[0].name = f"packed_{kind}_{self.count}"
        self.graph.insert_before(self.place, node)
        return node.outputs[0]

    def once(self, key: tuple, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` gave the first time that it was asked for under `key`."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def constant(self, array: np.ndarray | np.generic) -> ir.Value:
        """Stored once, however often it is asked for: by shared layers, by a table and the head that is tied to it."""
        array = np.ascontiguousarray(array) if array.ndim else np.array(array)
        digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
        return self.once((array.dtype.str, array.shape, digest), lambda: self.own_constant(array))

    def floats(self, array: np.ndarray) -> ir.Value:
        """Numbers in float32, which take the room of their own dtype in the file."""
        value = self.constant(array)
        return value if array.dtype == np.float32 else self.once(("floats", value), lambda: self.cast(value))

    def cast(self, value: ir.Value) -> ir.Value:
        return self.add("Cast", value, to=FLOAT)

    def own_constant(self, array: np.ndarray) -> ir.Value:
        """Stored for one reader alone, which ONNX Runtime may change: zero points of i8 that it makes u8."""
        tensor = ir.tensor(array)
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
