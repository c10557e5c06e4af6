"""The engines: each is made from the integers of a weight, and multiplies rows of float32 or bfloat16 by it.

    body = Int4(integers(stored))
    y = body(x, bias)  # (M, K) -> (M, N), the dtype of x

Making one raises ValueError for a weight that its kernel does not take. Errors are relative, in the Frobenius norm,
against the float64 product with the stored weight; the tests hold them.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engines.integers import Integers
from hf_compress.engines.onnxruntime import OnnxRuntime

INT4_GROUPS = (256, 128, 64, 32)  # what ATen's kernel takes
LARGEST_INT8 = 127


def need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"The kernel needs {what}.")


class Float32:
    """The dequantized weight, in float32. Error: float32 rounding. 4 bytes a weight."""

    def __init__(self, weight: Integers):
        self.weight = weight.dequantize()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.float(), self.weight, None if bias is None else bias.float()).to(x.dtype)


class BFloat16:
    """The dequantized weight in bfloat16, laid out by oneDNN. Error at most 5e-3. 2 bytes a weight."""

    def __init__(self, weight: Integers):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.dequantize().bfloat16(), None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.bfloat16()
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, bias, "none", [], "").to(x.dtype)


class Int4:
    """ATen's kernel for 4-bit weights in groups and bfloat16 activations. Error at most 6e-3. Half a byte a weight.

    Weights of 2 and 3 bit use the middle of the 4-bit grid: the same numbers.
    """

    def __init__(self, weight: Integers):
        (N, K), g = weight.q.shape, weight.group_size
        need(weight.bits <= 4 and N % 16 == 0 and K % 32 == 0, "at most 4 bits, N a multiple of 16 and K of 32")
        size = next((size for size in INT4_GROUPS if g % size == 0), None)
        need(size is not None, f"groups that are multiples of {INT4_GROUPS[-1]}")
        self.perm, self.group_size = weight.perm, size
        middle = 2 ** (weight.bits - 1)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.q.int() + (8 - middle), 1)
        # the kernel computes (q - 8) * scale + zero, both in bfloat16
        pairs = torch.stack([weight.scales, (middle - weight.zeros) * weight.scales], dim=-1)  # (N, G, 2)
        self.scales_and_zeros = pairs.transpose(0, 1).repeat_interleave(g // size, dim=0).bfloat16().contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        half = x.bfloat16() if self.perm is None else x.bfloat16()[:, self.perm]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            half.contiguous(), self.packed, self.group_size, self.scales_and_zeros
        ).to(x.dtype)
        return y if bias is None else y.add_(bias)


class Int8Weights:
    """ATen's kernel for 8-bit weights, one scale a row, bfloat16 activations. Error at most 6e-3. 1 byte a weight."""

    def __init__(self, weight: Integers):
        (N, K), G = weight.q.shape, weight.scales.shape[1]
        # ATen's kernel reads beyond the weight at other sizes
        need(
            weight.bits == 8 and G == 1 and N % 16 == 0 and K % 32 == 0, "8 bits, one scale a row, N % 16 = K % 32 = 0"
        )
        self.q = (weight.q ^ 128).view(torch.int8)  # q - 128
        self.scales = weight.scales[:, 0].bfloat16()
        shift = (128 - weight.zeros[:, 0]) * weight.scales[:, 0]
        self.shift = shift if bool(shift.any()) else None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x.bfloat16().contiguous(), self.q, self.scales)
        if self.shift is not None:  # scale * (q - zero) = scale * (q - 128) + scale * (128 - zero)
            y = y + x.sum(1, keepdim=True, dtype=torch.float32) * self.shift
        y = y.to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)


class Int8Products:
    """oneDNN's products of 8-bit integers: each token is rounded to its own symmetric grid. 1 byte a weight.

    Error at most 2e-2, nearly all from rounding the activations; against the product with the rounded activations it is
    float32 rounding, and in bfloat16 that of the output.
    """

    def __init__(self, weight: Integers):
        need(weight.bits == 8 and weight.scales.shape[1] == 1, "8 bits and one scale a row")
        need(bool((weight.zeros == 128).all()), "the zero point 128")
        self.scales = weight.scales[:, 0].contiguous()
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack((weight.q ^ 128).view(torch.int8), None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float().div_(LARGEST_INT8)  # (M, 1)
        q = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 0, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(scale) if bias is None else torch.addcmul(bias.float(), y, scale)
        return y.to(x.dtype)


class Int8Dynamic:
    """PyTorch's dynamic 8-bit linear, by `library`: all activations of a call are rounded to one grid.

    Error at most 3e-2, nearly all from the activations; what else is in a batch moves it. 1 byte a weight.
    """

    def __init__(self, weight: Integers, library: str):
        need(weight.bits == 8 and weight.scales.shape[1] == 1, "8 bits and one scale a row")
        need(library == "fbgemm" or bool((weight.zeros == 128).all()), "the zero point 128, other than in fbgemm")
        need(library in torch.backends.quantized.supported_engines, f"a PyTorch built with {library}")
        scales, before = weight.scales[:, 0].double(), torch.backends.quantized.engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch announces the end of quantized tensors
            zeros = weight.zeros[:, 0].long() - 128
            q = torch._make_per_channel_quantized_tensor((weight.q ^ 128).view(torch.int8), scales, zeros, 0)
        try:
            torch.backends.quantized.engine = library
            self.packed = torch.ops.quantized.linear_prepack(q, None)
        finally:
            torch.backends.quantized.engine = before

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic(x.float(), self.packed)
        return (y if bias is None else y.add_(bias)).to(x.dtype)


BODIES = {
    "float32": Float32,
    "bfloat16": BFloat16,
    "int4": Int4,
    "int8_weights": Int8Weights,
    "int8_products": Int8Products,
    "fbgemm": partial(Int8Dynamic, library="fbgemm"),
    "onednn": partial(Int8Dynamic, library="onednn"),
    "onnxruntime": OnnxRuntime,
}
