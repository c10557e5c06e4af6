"""A linear layer whose weight is stored in 2, 3, 4 or 8 bit, in GPTQ's layout."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.engines.direct import DirectCalls
from hf_compress.engines.integers import Stored
from hf_compress.engines.ops import (
    pack_gptq,
    pack_zeros,
    unpack_gptq,
    unpack_zeros,
    w8a8_linear,
    wna16_linear,
    wna16_pack,
    words_per_row,
)
from hf_compress.engines.packed import FEW_TOKENS, engine_in_graph, packed_linear
from hf_compress.engines.processor import choose_route
from hf_compress.layers.activations import round_per_token, round_to_range
from hf_compress.layers.read_only import read_only
from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme

logger = logging.getLogger(__name__)

ENGINE_DTYPES = torch.float32, torch.bfloat16


class PackedModule:
    """What packed layers share: scales keep their dtype when the model is cast, and `weight` is a read-only copy."""

    KEPT = "scales"  # the buffer that keeps its dtype

    scheme: WeightScheme
    compute_dtype: torch.dtype  # of `weight`; follows `model.to(dtype)`
    one_copy = False  # True in models that decode: their CPU engines make no second copy of the weight

    @property
    def weight(self) -> Tensor:
        return read_only(self.dequantize())

    def _apply(self, fn, recurse: bool = True):
        before = getattr(self, self.KEPT)
        super()._apply(fn, recurse)
        after = getattr(self, self.KEPT)
        if after.dtype != before.dtype:
            setattr(self, self.KEPT, before.to(after.device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=after.device)).dtype
        self.prepare()
        return self

    def prepare(self) -> None:
        """Called when the stored tensors are there, or have moved."""


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


class PackedLinear(PackedModule, nn.Linear):
    """y = x W^T + bias with a packed W (N, K). Takes the place of an `nn.Linear` or a `Conv1D`.

    qweight  (K * bits / 32, N)         int32, rounded up
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
        self.runtime = None  # the kernels' layout, see `prepare`
        self.route = None  # how the CPU's engines run it; None: without one
        self.direct = None  # the engines it has used
        self.in_graph = None  # the engine that compiled decoding steps hold
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
        device, bits = self.qweight.device, self.scheme.bits
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

    def unpacked(self, dtype: torch.dtype | None = None) -> nn.Linear | Conv1D:
        return unpacked_linear(self, self.dequantize(dtype), is_conv1d=self.is_conv1d)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, K) uint8, zero points (G, N) uint8, and the group of each column (K,) int64."""
        bits = self.scheme.bits
        q = unpack_gptq(self.qweight, bits, self.in_features)
        if self.qzeros is None:
            zero_points = torch.full_like(self.scales, 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zero_points = unpack_zeros(self.qzeros, bits, self.out_features)
        if self.g_idx is not None:
            groups = self.g_idx.long()
        else:
            groups = torch.arange(self.in_features, device=q.device) // (self.in_features // len(self.scales))
        return q, zero_points, groups

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, K), computed in float32 and then cast to `dtype`, by default the model's."""
        q, zero_points, groups = self.integers()
        if self.g_idx is None:
            centred = q.unflatten(1, (len(self.scales), -1)) - zero_points.t()[..., None].float()  # (N, G, g)
            weight = (centred * self.scales.t()[..., None].float()).flatten(1)  # (N, K)
        else:
            weight = (q - zero_points.float()[groups].t()) * self.scales.float()[groups].t()
        return weight.to(dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and type(x) is Tensor:
            y = self._direct(x)
            if y is not None:
                return y
        if torch.is_autocast_enabled(x.device.type):  # as nn.Linear does
            x = x.to(torch.get_autocast_dtype(x.device.type))
        on_engine = self.route is not None and x.dtype in ENGINE_DTYPES
        if self.scheme.activation_range is not None:
            x = round_to_range(x, *self.scheme.activation_range)
        elif self.scheme.activation_bits is not None:
            if on_engine and self._route_of_inputs() == "int8":
                return packed_linear(x, self.bias, self._stored(), "int8")
            if self.is_int8 and not (x.requires_grad and torch.is_grad_enabled()):
                weight = (unpack_gptq(self.qweight, 8, self.in_features).int() - 128).to(torch.int8)
                return w8a8_linear(x, weight, self.scales[0].float(), self.bias)
            x = round_per_token(x)
        if on_engine:
            if torch.compiler.is_compiling() and self.one_copy and not torch.is_grad_enabled():
                rows = x.reshape(-1, self.in_features)
                if rows.shape[0] <= FEW_TOKENS and self._is_in_graph():
                    return self.in_graph(rows, self.bias).reshape(*x.shape[:-1], self.out_features)
            return packed_linear(x, self.bias, self._stored(), self.route)
        if self.runtime is not None and x.dtype == self.runtime.dtype:
            return wna16_linear(x, self.runtime, self.bias)
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def _direct(self, x: Tensor) -> Tensor | None:
        """What the CPU's engines make of `x`, without asking anew which one; None for another way."""
        route = self._route_of_inputs()
        if route is None or x.dtype not in ENGINE_DTYPES or torch.is_autocast_enabled("cpu"):
            return None
        if self.direct is None or not self.direct.are_of(self._buffers):
            stored = self._stored()
            if not DirectCalls.are_possible(stored):
                return None
            self.direct = DirectCalls(stored, route)
        return self.direct(x, self._parameters.get("bias"))

    def _is_in_graph(self) -> bool:
        """Called while a graph is traced: whether `in_graph` multiplies few tokens by operators of PyTorch alone."""
        if self.in_graph is None:
            self.in_graph = engine_in_graph(self._stored(), self.route, self.compute_dtype)
        return self.in_graph is not None

    # what torch.compiler.assume_constant_result does, which imports the compiler and its second of modules
    _is_in_graph._dynamo_marked_constant = True

    def _route_of_inputs(self) -> str | None:
        """How the CPU's engines take inputs as they come; None where they are rounded first, or without an engine."""
        if self.route is None or self.scheme.activation_bits is None:
            return self.route
        return "int8" if self.is_int8 and self.route != "exact" else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "direct": None, "in_graph": None}

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)  # writes into the stored tensors
        self.in_graph = None

    def _stored(self) -> Stored:
        return Stored(self.qweight, self.scales, self.qzeros, self.g_idx, self.scheme.bits, self.out_features,
                      self.in_features, False)  # fmt: skip

    @property
    def is_int8(self) -> bool:
        """Whether products of 8-bit integers give the outputs: symmetric, one scale a row, each token its own range."""
        scheme = self.scheme
        return scheme.bits == 8 and scheme.symmetric and len(self.scales) == 1 and scheme.activation_range is None

    def prepare(self) -> None:
        """Lay the weight out for the kernels where they run. The stored tensors stay what is saved.

        On the CPU the engines of `hf_compress.engines` run it. A small weight there, and groups that the kernels' tiles
        do not fit, are dequantized on the fly.
        """
        self.runtime, self.route, self.direct, self.in_graph = None, None, None, None
        if self.qweight.device.type == "meta":
            return
        if self.qweight.device.type == "cpu":
            self.route = choose_route(self.out_features * self.in_features, one_copy=self.one_copy)
            return
        q, zero_points, _ = self.integers()
        try:
            self.runtime = wna16_pack(q, self.scales, zero_points, self.scheme.bits, self.scheme.group_size,
                                      self.compute_dtype, self.g_idx)  # fmt: skip
        except ValueError as error:
            logger.info("A packed layer runs without its kernel: %s", error)

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
