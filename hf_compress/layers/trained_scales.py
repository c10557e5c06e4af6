"""Packed layers whose scales are trained: w = s0 (1 + t) (q - z), with the integers q as they are.

What is computed is what will be stored: scales in their stored dtype and whole zero points, gradients straight through.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engines.ops import pack_zeros
from hf_compress.engines.packed_weight import PackedWeight, Stored
from hf_compress.layers.packed_blocks import PackedBlocksLinear
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.packed_module import as_autocast
from hf_compress.layers.scheme import SCALE_DTYPES
from hf_compress.model.classes import made_class
from hf_compress.model.unfinished import FORM

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


class TrainedScales(nn.Module):
    """The form (see `training.pieces`) of a packed layer whose scales are trained, and what is learned for it.

    t       (N, G)  float32; a scale is its first value times 1 + t
    u       (N, G)  float32; a zero point is its first value plus `zero_point_rate` * u, rounded. None where they stay
    s0, z0  (N, G)  the first values. What a layer saves on the way are those of now
    """

    column_unit, hears_all = 1, True

    def __init__(self, layer: PackedLinear, *, zero_point_rate: float = 0.0):
        super().__init__()
        first = layer.packed_weight()
        self.original_class, self.bits, self.zero_point_rate = type(layer), first.bits, zero_point_rate
        self.dtype = layer.scales.dtype  # of what is stored
        self.register_buffer("s0", first.scales.float().contiguous())
        self.register_buffer("z0", first.zeros.contiguous())
        self.t = nn.Parameter(torch.zeros_like(self.s0))
        self.u = nn.Parameter(torch.zeros_like(self.s0)) if zero_point_rate else None

    def scales(self) -> Tensor:
        """(N, G) float32, with the values of the stored dtype."""
        s = self.s0 * (1 + self.t).clamp(min=LEAST)
        return s + (s.to(self.dtype).float() - s).detach()

    def zero_points(self) -> Tensor:
        """(N, G) float32, whole numbers in [0, 2^bits - 1]."""
        if self.u is None:
            return self.z0.float()
        z = (self.z0.float() + self.zero_point_rate * self.u).clamp(0, 2**self.bits - 1)
        return z + (z.round() - z).detach()

    def forward(self, x: Tensor, first: PackedWeight) -> Tensor:
        """x (M, K) times the weight that the layer's own, `first`, has become."""
        groups = None if first.g_idx is None else first.groups
        return ScaledProduct.apply(x, self.scales(), self.zero_points(), first.q, groups)

    @torch.no_grad()
    def now(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points as they would be stored, (N, G)."""
        return self.scales().to(self.dtype), self.zero_points().to(torch.uint8)

    # What a form does

    def check(self, name: str) -> None:
        if not self.now()[0].isfinite().all():
            raise ValueError(
                f"{name}: its trained scales are no numbers of {self.dtype}. Lower learning_rate, or store "
                "float32 (scale_dtype)."
            )

    def select(self, transaction, rows: Sequence[int] | None, columns: Sequence[int] | None) -> None:
        raise ValueError("A packed weight cannot be cut: prune before quantizing, then train the scales.")

    def put_on(self, module: PackedLinear) -> None:
        module.__class__ = made_class(f"Scaled{self.original_class.__name__}", ScaledLinear, self.original_class)
        vars(module)[FORM] = self  # not a submodule: what is learned belongs to the training
        module.prepare()

    def take_off(self, module: PackedLinear) -> None:
        module.__class__ = self.original_class
        del vars(module)[FORM]
        module.prepare()

    def stored(self, module: PackedLinear) -> PackedLinear:
        for name, tensor in buffers(self, module).items():
            setattr(module, name, tensor)
        module.prepare()
        return module


def buffers(form: TrainedScales, layer: PackedLinear) -> dict[str, Tensor]:
    """The buffers of `layer` that training changes, as they are now."""
    scales, zeros = form.now()
    found = {"scales": scales.t().contiguous()}
    if layer.qzeros is not None:
        found["qzeros"] = pack_zeros(zeros.t().contiguous(), form.bits)
    return found


class ScaledLinear:
    """Mixin of a packed layer while its scales are trained: it multiplies by, and saves, what they are now.

    What its words stand for is kept between passes, a byte for each weight, until they change.
    """

    def prepare(self, *, decodes: bool | None = None) -> None:
        self.decodes = self.decodes if decodes is None else decodes
        self.route, self.run = Stored.weight, None

    def packed_weight(self) -> PackedWeight:
        scales, zeros = vars(self)[FORM].now()
        return replace(self._current(), scales=scales, zeros=zeros)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = as_autocast(x)
        y = vars(self)[FORM](self.rounded(x.reshape(-1, self.in_columns)), self._current())
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in buffers(vars(self)[FORM], self).items()})


@torch.no_grad()
def train_scales(
    model: nn.Module, *, skip: Sequence[nn.Module] = (), scale_dtype: str | None = None, zero_point_rate: float = 0.0
) -> dict[str, TrainedScales]:
    """Changes `model`: its packed linear layers, but for those in `skip`, compute with scales that learn.

    `scale_dtype` is what they are stored in from now on, by default what they are. Returns what is learned, by module
    name; `finish` stores it. Raises ValueError, naming the module, for zero points that are not stored, or that keep
    empty blocks empty.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and m not in skip}
    for name, layer in layers.items() if zero_point_rate else ():
        if layer.scheme.symmetric or isinstance(layer, PackedBlocksLinear):
            why = "is symmetric and stores none" if layer.scheme.symmetric else "needs them for its empty blocks"
            raise ValueError(f"zero_point_rate trains zero points, but {name} {why}: set it to 0.")
    forms = {}
    for name, layer in layers.items():
        if scale_dtype is not None:
            layer.scheme = replace(layer.scheme, scale_dtype=scale_dtype)
            layer.scales = layer.scales.to(SCALE_DTYPES[scale_dtype])
        forms[name] = TrainedScales(layer, zero_point_rate=zero_point_rate)
        forms[name].put_on(layer)
    return forms
