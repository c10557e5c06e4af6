"""A linear layer whose weights are indices into a few levels of their row and group."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.engines.ops import pack_gptq, unpack_gptq
from hf_compress.engines.routes import choose_dense
from hf_compress.layers.packed_linear import unpacked_linear
from hf_compress.layers.packed_module import Multiplies
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme

OCTET = (
    8  # indices of one bit that are packed as one integer: the same stream of bits, and packing knows no single ones
)


def num_words(in_features: int, bits: int) -> int:
    return -(-in_features * bits // 32)


def pack_indices(index: Tensor, bits: int) -> Tensor:
    """Indices (N, K) below 2^bits as int32 words (ceil(K * bits / 32), N), in the order of `pack_gptq`."""
    if bits > 1:
        return pack_gptq(index.to(torch.uint8), bits)
    if int(index.max()) > 1 or int(index.min()) < 0:
        raise ValueError(f"Indices of one bit are 0 or 1, got {int(index.min())} to {int(index.max())}.")
    octets = F.pad(index.int(), (0, -index.shape[1] % OCTET)).unflatten(1, (-1, OCTET))  # (N, K / 8, 8)
    return pack_gptq((octets << torch.arange(OCTET, device=index.device)).sum(-1).to(torch.uint8), OCTET)


def unpack_indices(words: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_indices`: uint8 (N, in_features)."""
    if bits > 1:
        return unpack_gptq(words, bits, in_features)
    octets = unpack_gptq(words, OCTET, -(-in_features // OCTET))  # (N, K / 8)
    shifts = torch.arange(OCTET, dtype=torch.uint8, device=words.device)
    return ((octets[..., None] >> shifts) & 1).flatten(1)[:, :in_features].contiguous()


class Levels(NamedTuple):
    """A weight (N, K) as indices into levels, stored as the layer below stores them."""

    words: Tensor
    levels: Tensor
    bits: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    def weight(self) -> "Levels":
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K)."""
        index = unpack_indices(self.words, self.bits, self.in_features).long().unflatten(1, (len(self.levels), -1))
        return self.levels.transpose(0, 1).gather(2, index).flatten(1).to(dtype)  # (N, K)


class CodebookLinear(Multiplies, nn.Linear):
    """y = x W^T + bias, W[n, k] = levels[k // group_size, n, index[n, k]].

    qweight  (K * bits / 32, N)  int32, rounded up, the indices
    levels   (G, N, L)           float16 or float32, kept when the model is cast
    """

    KEPT = "levels"

    def __init__(self, in_features: int, out_features: int, scheme: WeightScheme, *, dtype: torch.dtype,
                 device: torch.device | str | None = None, is_conv1d: bool = False):  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme, self.is_conv1d = in_features, out_features, scheme, is_conv1d
        self.compute_dtype = dtype
        groups, words = scheme.num_groups(in_features), num_words(in_features, scheme.bits)
        levels = torch.zeros(
            groups, out_features, scheme.num_levels, dtype=SCALE_DTYPES[scheme.scale_dtype], device=device
        )
        self.register_buffer("qweight", torch.zeros(words, out_features, dtype=torch.int32, device=device))
        self.register_buffer("levels", levels)
        self.bias = None

    @classmethod
    def like(cls, module: nn.Linear | Conv1D, scheme: WeightScheme) -> "CodebookLinear":
        """An empty layer in place of `module`, on its device, with its very bias."""
        is_conv1d, weight = isinstance(module, Conv1D), module.weight
        K, N = weight.shape if is_conv1d else weight.shape[::-1]
        layer = cls(K, N, scheme, dtype=weight.dtype, device=weight.device, is_conv1d=is_conv1d)
        layer.bias = module.bias
        return layer

    def fill(self, index: Tensor, levels: Tensor) -> "CodebookLinear":
        """Pack indices (N, K) into the levels (G, N, L), in place."""
        device = self.qweight.device
        self.qweight = pack_indices(index, self.scheme.bits).to(device)
        self.levels = levels.to(device, self.levels.dtype)
        self.prepare()
        return self

    def indices(self) -> Tensor:
        return unpack_indices(self.qweight, self.scheme.bits, self.in_features)

    @property
    def in_columns(self) -> int:
        return self.in_features

    def stored(self) -> Levels:
        return Levels(self.qweight, self.levels, self.scheme.bits, self.in_features)

    def _choose(self, stored: Levels):
        return choose_dense(stored.out_features * stored.in_features, decodes=self.decodes)

    def unpacked(self, dtype: torch.dtype | None = None) -> nn.Linear | Conv1D:
        return unpacked_linear(self, self.dequantize(dtype), is_conv1d=self.is_conv1d)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def check(self, name: str) -> None:
        """Raise ValueError, naming `name`, for loaded tensors that would read outside their levels or make NaN."""
        if not self.levels.isfinite().all():
            raise ValueError(f"{name}.levels holds NaN or infinity: the file is damaged.")
        if (largest := int(self.indices().max())) >= self.scheme.num_levels:
            raise ValueError(
                f"{name}.qweight must hold indices below {self.scheme.num_levels}, got {largest}: the file is damaged."
            )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"
