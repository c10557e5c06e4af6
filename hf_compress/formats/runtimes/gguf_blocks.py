"""Weights in ggml's types: blocks of 32 columns, a float16 scale and small signed integers each.

A packed weight w = scale * (q - zero) keeps its integers, since q - zero is small:

    Q4_0  [-8, 7]      4 bit symmetric; 2 and 3 bit with any zero points
    Q5_0  [-16, 15]    4 bit asymmetric; Q4_1 would round -zero * scale to float16
    Q8_0  [-128, 127]  8 bit symmetric
"""

from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from hf_compress.formats.named_weight import NamedWeight

BLOCK = 32
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


@dataclass(frozen=True)
class Matrix:
    """A tensor on its way into the file: (N, K) or (N,).

    values  float32, or int16 in blocks
    scales  (N, K / 32) float16 in blocks, else None
    """

    kind: Type
    values: np.ndarray
    scales: np.ndarray | None = None

    def with_rows(self, number: int) -> "Matrix":
        """Rows of zeros at the end, up to `number`."""
        return self._changed(lambda a: np.pad(a, ((0, number - len(a)), *((0, 0),) * (a.ndim - 1))))

    def with_columns(self, number: int) -> "Matrix":
        """Columns of zeros at the end, up to `number`, which is a multiple of 32 for blocks."""
        return self._changed(
            lambda a: np.pad(a, ((0, 0), (0, (number if a is self.values else number // BLOCK) - a.shape[1])))
        )

    def permuted(self, heads: int) -> "Matrix":
        """Rows of q and k: Transformers rotates the halves of a head, llama.cpp's `llama` neighbouring rows."""
        return self._changed(lambda a: a.reshape(heads, 2, -1, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape))

    def _changed(self, change) -> "Matrix":
        scales = None if self.scales is None else np.ascontiguousarray(change(self.scales))
        return replace(self, values=np.ascontiguousarray(change(self.values)), scales=scales)

    def unpacked(self) -> "Matrix":
        """The same numbers in float32."""
        return Matrix(Type.F32, self.decoded())

    def decoded(self) -> np.ndarray:
        """float32, as whoever reads the file has it."""
        if self.scales is None:
            return self.values
        return self.values.astype(np.float32) * np.repeat(self.scales.astype(np.float32), BLOCK, axis=1)

    def data(self) -> np.ndarray:
        """What is stored: (N, bytes of a row), or the numbers of F32 and F16."""
        if self.scales is None:
            return gguf.quants.quantize(self.values, self.kind)
        d = np.ascontiguousarray(self.scales)[..., None].view(np.uint8)  # (N, K / 32, 2)
        q = self.values.reshape(len(self.values), -1, BLOCK)
        if self.kind == Type.Q8_0:
            parts = d, q.astype(np.int8).view(np.uint8)
        else:
            q = (q + (8 if self.kind == Type.Q4_0 else 16)).astype(np.uint8)
            low = (q[..., :16] & 15) | (q[..., 16:] & 15) << 4
            high = np.packbits(q >> 4, axis=-1, bitorder="little")
            parts = (d, low) if self.kind == Type.Q4_0 else (d, high, low)
        return np.concatenate(parts, axis=-1).reshape(len(self.values), -1)


def dense_matrix(tensor: Tensor) -> Matrix:
    """Numbers as they are: of the tensor's own dtype, vectors in float32, as ggml wants them."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"GGUF has float32, float16 and bfloat16, not {tensor.dtype}.")
    kind = FLOATS[tensor.dtype] if tensor.ndim > 1 else Type.F32
    return Matrix(kind, tensor.detach().float().cpu().numpy())


def block_matrix(weight: NamedWeight, *, fill: bool = False) -> Matrix:
    """The integers of `weight`; `fill` allows columns of zeros up to whole blocks.

    Raises ValueError, naming the module, for what ggml's blocks cannot hold exactly.
    """
    scheme, (_, K), size = weight.scheme, weight.q.shape, weight.group_size
    scales = weight.scales.astype(np.float16)
    if scheme.activation_bits is not None:
        raise ValueError(f"{weight.name} rounds its inputs, which GGUF cannot say. Quantize without activation bits.")
    if scheme.bits == 8 and not scheme.symmetric:
        raise ValueError(f"{weight.name}: GGUF has no 8-bit type with zero points. Quantize with symmetric=True.")
    if (size % BLOCK and weight.num_groups > 1) or (K % BLOCK and not fill):
        raise ValueError(
            f"{weight.name}: GGUF has blocks of {BLOCK} columns, which groups of {size} and rows of {K} do not fill. "
            f"Quantize with a group_size that is a multiple of {BLOCK}, or leave it out with `skip_modules`."
        )
    if (scales.astype(np.float32) != weight.scales).any():
        raise ValueError(f"{weight.name}: its float32 scales do not fit float16, which GGUF has.")
    kind = Type.Q8_0 if scheme.bits == 8 else Type.Q4_0 if scheme.symmetric or scheme.bits < 4 else Type.Q5_0
    signed = np.pad(weight.signed(), ((0, 0), (0, -K % BLOCK)))
    return Matrix(kind, signed, np.repeat(scales, signed.shape[1] // BLOCK // weight.num_groups, axis=1))
