"""The ways to multiply by a packed weight on a CPU, and the rule that chooses one.

    run = choose(stored, decodes=False)(stored)
    y = run(x, bias)  # (M, K) -> (M, N), in the dtype of x: float32, bfloat16 or float16

Errors are relative, in the Frobenius norm, against the float64 product with the stored weight; the tests hold them.
`traceable` says that a run is made of PyTorch's own operators over plain tensors, which a compiled graph can hold.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engines import processor
from hf_compress.engines.low_bit import Int4, Int8Halves, Int8Weights
from hf_compress.engines.packed_weight import Stored
from hf_compress.engines.pieces import in_pieces
from hf_compress.engines.rounding import AT_ONCE, Rounded, grid_of_range, round_to_bytes

Run = Callable[[Tensor, Tensor | None], Tensor]
SMALLEST = 16384  # weights; below this a call costs more than it multiplies, and `F.linear` costs least
FEW_TOKENS = 16  # at most, for kernels that read the weight once a token
ROWS_AT_ONCE = 2048  # output features dequantized together, to bound memory


def choose(
    stored: Stored, *, decodes: bool, rounds: bool = False, activation_range: tuple[float, float] | None = None
) -> Callable[[Stored], Run] | None:
    """What makes the run for a weight, or None for the plain path: the weight dequantized in each call.

    decodes           the model generates: most products are of few tokens, and no second copy of the weight is wanted
    rounds            the layer's record asks for activations of 8 bits,
    activation_range  and for this range of theirs
    """
    weights = stored.out_features * stored.in_features
    dense = choose_dense(weights)
    if dense is None or weights < SMALLEST or processor.mode() == "exact":
        return dense
    integers = stored.is_8_bit_rows and processor.has_int8()
    many = partial(Int8Rows, activation_range=activation_range) if integers else dense
    if not decodes and not rounds and processor.has_bfloat16():
        return dense  # as fast, and the inputs keep their digits
    if not decodes or (integers and rounds):
        return many
    kernels = (Int4, Int8Weights, Int8Halves) if processor.has_avx512() else (Int4, Int8Weights)
    few = next((kind for kind in kernels if kind.takes(stored)), None)
    if few is None:  # mostly one token, for which oneDNN's layout of float32 takes up to half as long again
        return Float32 if many is OneDnnFloat32 else many
    return partial(FewAndMany, few, many if integers else PerCall)


def choose_dense(weights: int, *, decodes: bool = False) -> Callable[..., Run] | None:
    """The product with the dense weight that is fastest here, or None for the plain path.

    In models that decode an exact product may keep the weight, as the user asked for it; another one may not.
    """
    wanted = processor.mode()
    if wanted == "reference" or (decodes and wanted == "auto"):
        return None
    if wanted == "exact" or weights < SMALLEST:
        return Float32
    return BFloat16 if processor.has_bfloat16() else OneDnnFloat32 if processor.has_slow_mkl() else Float32


class Float32:
    """The dequantized weight, in float32. Error: float32 rounding. 4 bytes a weight."""

    name, traceable, rounds = "float32", True, False

    def __init__(self, stored: Stored):
        self.weight = stored.weight().dequantize(torch.float32)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32):
            return F.linear(x, self.weight, bias)
        return F.linear(x.float(), self.weight, None if bias is None else bias.float()).to(x.dtype)


class BFloat16:
    """The dequantized weight in bfloat16, laid out by oneDNN. Error at most 5e-3. 2 bytes a weight."""

    name, dtype, traceable, rounds = "bfloat16", torch.bfloat16, False, False

    def __init__(self, stored: Stored):
        dense = stored.weight().dequantize(self.dtype)
        self.out_features = len(dense)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(dense, None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and bias.dtype is not self.dtype:
            bias = bias.to(self.dtype)
        product = lambda rows: torch.ops.mkldnn._linear_pointwise(rows, self.weight, bias, "none", [], "")  # noqa: E731
        # an operator that changes nothing costs microseconds, and a small layer a hundred
        rows = x if x.dtype is self.dtype else x.to(self.dtype)
        y = in_pieces(rows, product, self.out_features, self.dtype)
        return y if y.dtype is x.dtype else y.to(x.dtype)


class OneDnnFloat32(BFloat16):
    """The same in float32, for processors on which MKL is slow. Error: float32 rounding. 4 bytes a weight."""

    name, dtype = "float32 by oneDNN", torch.float32


class Int8Rows:
    """oneDNN's products of 8-bit integers: u8 activations with a zero point times s8 weights. 1 byte a weight.

    Activations are rounded to a calibrated `activation_range`, or each token to its own symmetric grid. The error is at
    most 2e-2, nearly all of it from that; against the product of the rounded activations it is float32 rounding, and in
    bfloat16 that of the output.
    """

    name, traceable, rounds = "8-bit integers", False, True

    def __init__(self, stored: Stored, activation_range: tuple[float, float] | None = None):
        weight = stored.weight()
        self.range, self.out_features = activation_range, stored.out_features
        self.scales = weight.scales[:, 0].float().contiguous()
        self.no_zeros = torch.zeros(len(self.scales), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack((weight.q ^ 128).view(torch.int8), None)  # q - 128
        shift = (128 - weight.zeros[:, 0].float()) * self.scales
        self.shift = shift if bool(shift.any()) else None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rounded = round_to_bytes(x, self.range)
        bias = None if bias is None else bias.float()
        if self.range is not None and self.shift is None and x.dtype is not torch.float16:
            scale, _ = grid_of_range(*self.range)  # one for all rows: oneDNN multiplies by it and adds the bias
            product = partial(self._product, scale=scale, zero=rounded.zero, bias=bias, dtype=x.dtype)
            return in_pieces(rounded.q, product, self.out_features, x.dtype)
        M = x.shape[0]  # len() costs a microsecond
        if M <= AT_ONCE:
            y = self._scaled(rounded, bias)
            return y if y.dtype is x.dtype else y.to(x.dtype)
        y = x.new_empty(M, self.out_features)
        for start in range(0, M, AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            scale = rounded.scale if len(rounded.scale) == 1 else rounded.scale[rows]
            self._scaled(Rounded(rounded.q[rows], scale, rounded.zero), bias, out=y[rows])
        return y

    def _scaled(self, rounded: Rounded, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        y = in_pieces(rounded.q, partial(self._product, zero=rounded.zero), self.out_features, torch.float32)
        if self.shift is not None:  # scale * (q - zero) = scale * (q - 128) + scale * (128 - zero)
            sums = rounded.q.sum(1, keepdim=True, dtype=torch.float32) - rounded.zero * rounded.q.shape[1]
            y.addcmul_(sums, self.shift)
        if bias is None:
            return torch.mul(y, rounded.scale, out=y if out is None else out)
        return torch.addcmul(bias, y, rounded.scale, out=out)

    def _product(self, q: Tensor, *, scale: float = 1.0, zero: int, bias: Tensor | None = None,
                 dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
        return torch.ops.onednn.qlinear_pointwise(
            q, scale, zero, self.packed, self.scales, self.no_zeros, bias, 1.0, 0, dtype, "none", [], ""
        )


class PerCall:
    """The weight dequantized in each call, some rows at a time. Error of bfloat16 at most 8e-3. Keeps nothing."""

    traceable, rounds = False, False

    def __init__(self, stored: Stored, dtype: torch.dtype | None = None):
        self.dtype = dtype or (torch.bfloat16 if processor.has_bfloat16() else torch.float32)
        self.stored, self.name = stored.turned(), f"{self.dtype} per call".removeprefix("torch.")

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        N, rows = self.stored.out_features, x.to(self.dtype)
        y = x.new_empty(len(x), N)
        for start in range(0, N, ROWS_AT_ONCE):
            n = slice(start, min(start + ROWS_AT_ONCE, N))
            y[:, n] = rows @ self.stored.weight(n).dequantize(self.dtype).t()
        return y if bias is None else y.add_(bias)


class FewAndMany:
    """One run for few tokens, another for many."""

    traceable, rounds = False, False

    def __init__(self, few: Callable[[Stored], Run], many: Callable[[Stored], Run], stored: Stored):
        self.few, self.many = few(stored), many(stored)
        self.name = f"{self.few.name}, {self.many.name} for many tokens"

    def pick(self, tokens: int) -> Run:
        return self.few if tokens <= FEW_TOKENS else self.many

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.pick(x.shape[0])(x, bias)
