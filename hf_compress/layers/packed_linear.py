"""A linear layer whose weight is stored in 2, 3, 4 or 8 bit, in GPTQ's layout."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.engines.ops import pack_gptq, pack_zeros, words_per_row
from hf_compress.engines.packed_weight import Stored
from hf_compress.engines.rounding import grid_of_range, rounded_rows
from hf_compress.layers.activations import needs_gradient, round_per_token, round_to_grid
from hf_compress.layers.kernel_layout import KernelLayout
from hf_compress.layers.packed_module import Multiplies
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme


def unpacked_linear(layer: nn.Linear, weight: Tensor, *, is_conv1d: bool) -> nn.Linear | Conv1D:
    """The ordinary module with the dequantized `weight` (N, K): what `dequantize()` puts back."""
    if is_conv1d:
        module = Conv1D(layer.out_features, layer.in_features).to(weight.device, weight.dtype)
        module.weight = nn.Parameter(weight.t().contiguous())
    else:
        module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        module.weight = nn.Parameter(weight)
    module.bias = layer.bias
    return module


class PackedLinear(KernelLayout, Multiplies, nn.Linear):
    """y = x W^T + bias with a packed W (N, K). Takes the place of an `nn.Linear` or a `Conv1D`.

    qweight  (K * bits / 32, N)         int32, rounded up; empty where a kernel's layout holds them
    scales   (G, N)                     float16 or float32, kept when the model is cast
    qzeros   (G, N * bits / 32)         int32, the zero points as they are (GPTQ's v2); None when symmetric
    g_idx    (K,)                       int32, group of each column; None when groups are neighbouring columns
    """

    def __init__(self, in_features: int, out_features: int, scheme: WeightScheme, *, bias: bool = True,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                 is_conv1d: bool = False):  # fmt: skip
        nn.Module.__init__(self)  # not nn.Linear's: here `weight` is a property
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.is_conv1d = is_conv1d  # what it was, for `dequantize`
        self.grid = None if scheme.activation_range is None else grid_of_range(*scheme.activation_range)
        self.rounds = scheme.activation_bits is not None
        self.compute_dtype = dtype or torch.get_default_dtype()
        groups = scheme.num_groups(in_features)
        words = words_per_row(in_features, scheme.bits)
        scale_dtype = SCALE_DTYPES[scheme.scale_dtype]
        self.register_buffer("qweight", torch.zeros(words, out_features, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.ones(groups, out_features, dtype=scale_dtype, device=device))
        self.register_buffer("qzeros", None)
        self.register_buffer("g_idx", None)
        if not scheme.symmetric:
            words = words_per_row(out_features, scheme.bits)
            self.qzeros = torch.zeros(groups, words, dtype=torch.int32, device=device)
        if scheme.desc_act:
            self.g_idx = torch.zeros(in_features, dtype=torch.int32, device=device)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def like(cls, module: nn.Linear | Conv1D, scheme: WeightScheme) -> "PackedLinear":
        """An empty packed layer in place of `module`, on its device, with its very bias."""
        is_conv1d = isinstance(module, Conv1D)
        K, N = module.weight.shape if is_conv1d else module.weight.shape[::-1]
        weight = module.weight
        layer = cls(K, N, scheme, bias=False, dtype=weight.dtype, device=weight.device, is_conv1d=is_conv1d)
        layer.bias = module.bias
        return layer

    def fill(self, q: Tensor, scales: Tensor, zero_points: Tensor, g_idx: Tensor | None = None) -> "PackedLinear":
        """Pack integers (N, K) with their scales and zero points (G, N), in place. `g_idx` (K,) is for `desc_act`."""
        device, bits = self.scales.device, self.scheme.bits
        self.qweight = pack_gptq(q, bits).to(device)
        self.scales = scales.to(device, self.scales.dtype)
        if self.qzeros is not None:
            self.qzeros = pack_zeros(zero_points, bits).to(device)
        elif (zero_points != 2 ** (bits - 1)).any():
            raise ValueError(f"A symmetric weight of {bits} bits has the zero point {2 ** (bits - 1)} everywhere.")
        if self.g_idx is not None:
            self.g_idx = g_idx.to(device, torch.int32)
        self.prepare()
        return self

    @property
    def in_columns(self) -> int:
        return self.in_features

    def _stored(self, words: Tensor | None) -> Stored:
        return Stored(words, self.scales, self.qzeros, self.g_idx, self.scheme.bits, self.in_features, by_rows=False)

    def unpacked(self, dtype: torch.dtype | None = None) -> nn.Linear | Conv1D:
        return unpacked_linear(self, self.dequantize(dtype), is_conv1d=self.is_conv1d)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, K) uint8, zero points (G, N) uint8, and the group of each column (K,) int64."""
        weight = self.packed_weight()
        return weight.q, weight.zeros.t(), weight.groups

    @property
    def is_int8(self) -> bool:
        """Whether products of 8-bit integers give the outputs: symmetric, one scale a row, each token its own range."""
        scheme = self.scheme
        is_rows = scheme.bits == 8 and scheme.symmetric and len(self.scales) == 1
        return is_rows and scheme.activation_bits is not None and scheme.activation_range is None

    def rounded(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return x
        if x.is_cpu and not torch.compiler.is_compiling() and not needs_gradient(x):
            return rounded_rows(x, self.scheme.activation_range)
        return round_per_token(x) if self.grid is None else round_to_grid(x, *self.grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._parameters.get("bias"))

    def check(self, name: str) -> None:
        """Raise ValueError, naming `name`, for loaded tensors that would read outside their groups or make NaN."""
        if not self.scales.isfinite().all():
            raise ValueError(f"{name}.scales holds NaN or infinity: the file is damaged.")
        if self.g_idx is not None:
            first, last = int(self.g_idx.min()), int(self.g_idx.max())
            if first < 0 or last >= len(self.scales):
                raise ValueError(
                    f"{name}.g_idx must lie in [0, {len(self.scales) - 1}], got [{first}, {last}]: the file is damaged."
                )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"
