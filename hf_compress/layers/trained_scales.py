"""Packed layers whose scales are trained: w = s0 (1 + t) (q - z), whole zero points z, the integers q as they are."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engines.ops import pack_zeros
from hf_compress.engines.packed_weight import PackedWeight, Stored
from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.packed_blocks import PackedBlocksLinear
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import SCALE_DTYPES
from hf_compress.layers.trained_form import TrainedForm
from hf_compress.layers.trained_levels import TrainedLevels, are_powers_of_two

LEAST = 2.0**-6  # a scale stays above this share of what it was, so it never turns its weights over


class ScaledProduct(torch.autograd.Function):
    """x (M, K) times the weight s (q - z): (M, N), differentiable in x, s and z.

    The weight, in x's dtype, is made for the product and again for the gradients; it is never kept.

    q       (N, K)  uint8
    s, z    (N, G)  float32
    groups  (K,)    int64, the group of each column; None where groups are neighbouring columns
    """

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, z: Tensor, q: Tensor, groups: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, s, z, q, groups)
        return F.linear(x, _times(_centred(q, z, groups, x.dtype), s, groups).flatten(1))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, s, z, q, groups = ctx.saved_tensors
        wants_x, wants_s, wants_z = ctx.needs_input_grad[:3]
        centred = _centred(q, z, groups, grad.dtype)
        grad_x = grad @ _times(centred, s, groups).flatten(1) if wants_x else None
        of_weight = (grad.t() @ x).view_as(centred) if wants_s or wants_z else None
        grad_z = -s * _sums(of_weight, s, groups) if wants_z else None
        grad_s = _sums(of_weight.mul_(centred), s, groups) if wants_s else None
        return grad_x, grad_s, grad_z, None, None


def _centred(q: Tensor, z: Tensor, groups: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q - z, (N, G, g), or (N, K) with `groups`: whole numbers up to 255, exact in every dtype."""
    if groups is not None:
        return q.to(dtype).sub_(z.to(dtype)[:, groups])
    return q.to(dtype).unflatten(1, (z.shape[1], -1)).sub_(z.to(dtype)[..., None])


def _times(centred: Tensor, s: Tensor, groups: Tensor | None) -> Tensor:
    return centred * (s.to(centred.dtype)[:, groups] if groups is not None else s.to(centred.dtype)[..., None])


def _sums(values: Tensor, like: Tensor, groups: Tensor | None) -> Tensor:
    """Sums over the columns of each group, (N, G), in the dtype of `like`."""
    if groups is not None:
        return torch.zeros_like(like).index_add_(1, groups, values.to(like.dtype))
    return values.sum(-1, dtype=like.dtype)


class TrainedScales(TrainedForm):
    """The form of a packed layer whose scales are trained.

    t       (N, G)  float32; a scale is its first value times 1 + t
    u       (N, G)  float32; a zero point is its first value plus `zero_point_rate` * u, rounded. None where they stay
    s0, z0  (N, G)  the first values. What a layer saves on the way are those of now
    """

    read = staticmethod(Stored.weight)

    def __init__(self, layer: PackedLinear, *, zero_point_rate: float = 0.0):
        super().__init__(layer)
        first = layer.packed_weight()
        self.bits, self.zero_point_rate = first.bits, zero_point_rate
        self.register_buffer("s0", first.scales.float().contiguous())
        self.register_buffer("z0", first.zeros.contiguous())
        self.t = nn.Parameter(torch.zeros_like(self.s0))
        self.u = nn.Parameter(torch.zeros_like(self.s0)) if zero_point_rate else None

    def scales(self) -> Tensor:
        """(N, G) float32, with the values of the stored dtype."""
        return self.as_stored(self.s0 * (1 + self.t).clamp(min=LEAST))

    def zero_points(self) -> Tensor:
        """(N, G) float32, whole numbers in [0, 2^bits - 1]."""
        if self.u is None:
            return self.z0.float()
        z = (self.z0.float() + self.zero_point_rate * self.u).clamp(0, 2**self.bits - 1)
        return z + (z.round() - z).detach()

    def forward(self, x: Tensor, first: PackedWeight) -> Tensor:
        groups = None if first.g_idx is None else first.groups
        return ScaledProduct.apply(x, self.scales(), self.zero_points(), first.q, groups)

    @torch.no_grad()
    def now(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points as they would be stored, (N, G)."""
        return self.scales().to(self.dtype), self.zero_points().to(torch.uint8)

    def kept_numbers(self) -> Tensor:
        return self.now()[0]

    def weight_of(self, layer: PackedLinear) -> PackedWeight:
        scales, zeros = self.now()
        return replace(layer._current(), scales=scales, zeros=zeros)

    def buffers_of(self, layer: PackedLinear) -> dict[str, Tensor]:
        scales, zeros = self.now()
        found = {"scales": scales.t().contiguous()}
        if layer.qzeros is not None:
            found["qzeros"] = pack_zeros(zeros.t().contiguous(), self.bits)
        return found


@torch.no_grad()
def train_scales(
    model: nn.Module, *, skip: Sequence[nn.Module] = (), scale_dtype: str | None = None, zero_point_rate: float = 0.0
) -> dict[str, TrainedForm]:
    """Changes `model`: its packed linear layers, but for those in `skip`, compute with scales or levels that learn.

    `scale_dtype` is what they are stored in from now on, by default what they are. Returns what is learned, by module
    name; `finish` stores it. Raises ValueError, naming the module, for zero points that are not stored, or that keep
    empty blocks empty, and for levels that are powers of two.
    """
    kinds = PackedLinear, CodebookLinear
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in skip}
    for name, layer in layers.items() if zero_point_rate else ():
        if isinstance(layer, (PackedBlocksLinear, CodebookLinear)) or layer.scheme.symmetric:
            why = "needs them for its empty blocks" if isinstance(layer, PackedBlocksLinear) else "stores none"
            raise ValueError(f"zero_point_rate trains zero points, but {name} {why}: set it to 0.")
    for name, layer in layers.items():
        if isinstance(layer, CodebookLinear) and are_powers_of_two(layer.levels):
            raise ValueError(
                f"The levels of {name} are powers of two, and trained ones would be none any more: quantize with "
                "another grid, such as 'kmeans', or use the model as it is."
            )
    forms = {}
    for name, layer in layers.items():
        if scale_dtype is not None:
            layer.scheme = replace(layer.scheme, scale_dtype=scale_dtype)
            setattr(layer, layer.KEPT, getattr(layer, layer.KEPT).to(SCALE_DTYPES[scale_dtype]))
        is_codebook = isinstance(layer, CodebookLinear)
        forms[name] = TrainedLevels(layer) if is_codebook else TrainedScales(layer, zero_point_rate=zero_point_rate)
        forms[name].put_on(layer)
    return forms
