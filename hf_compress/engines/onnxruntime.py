"""ONNX Runtime's MatMulNBits on torch's memory, the fastest for few tokens. Optional: pip install hf_compress[cpu]."""

import numpy as np
import torch
from torch import Tensor

from hf_compress.engines.integers import Integers

BLOCKS = (256, 128, 64, 32, 16)  # block sizes of the kernel
INT8_ACCUMULATION = 4  # its `accuracy_level`: activations are rounded to 8 bits in blocks


class OnnxRuntime:
    """Products of 8-bit integers, the activations rounded in blocks. Error at most 2e-2. Bits / 8 bytes a weight.

    3-bit weights use a part of the 4-bit grid. It runs on the calling thread alone: at few tokens that one is close to
    the memory's speed, and a thread pool beside torch's would take its cores and not survive a fork.
    """

    def __init__(self, weight: Integers):
        import onnxruntime  # optional, and heavy
        from onnx import TensorProto, helper, numpy_helper

        self.perm, (N, K) = weight.perm, weight.q.shape
        bits = 4 if weight.bits == 3 else weight.bits
        size = next((size for size in BLOCKS if weight.group_size % size == 0), None)
        if size is None:
            raise ValueError(f"The kernel needs groups that are multiples of {BLOCKS[-1]}.")
        repeats = weight.group_size // size
        tensors = {
            "B": as_bytes(weight.q.unflatten(1, (-1, size)), bits),
            "S": weight.scales.repeat_interleave(repeats, dim=1).flatten().numpy(),
            "Z": as_bytes(weight.zeros.to(torch.uint8).repeat_interleave(repeats, dim=1), bits).reshape(-1),
        }
        node = helper.make_node("MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft", K=K, N=N, bits=bits,
                                block_size=size, accuracy_level=INT8_ACCUMULATION)  # fmt: skip
        ends = [
            helper.make_tensor_value_info(end, TensorProto.FLOAT, ["m", width]) for end, width in (("A", K), ("Y", N))
        ]
        initial = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], initial)
        domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        self.out_features = N
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = (x if self.perm is None else x[:, self.perm]).float().contiguous()
        y = torch.empty(len(rows), self.out_features)
        self.binding.bind_input("A", "cpu", 0, np.float32, tuple(rows.shape), rows.data_ptr())
        self.binding.bind_output("Y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())
        self.session.run_with_iobinding(self.binding)
        return (y if bias is None else y.add_(bias)).to(x.dtype)


def as_bytes(values: Tensor, bits: int) -> np.ndarray:
    """Integers (..., n) packed along the last dimension, lowest bits first, padded with zeros."""
    per_byte = 8 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte)).int()
    return (values << torch.arange(0, 8, bits, dtype=torch.int32)).sum(-1).to(torch.uint8).numpy()
