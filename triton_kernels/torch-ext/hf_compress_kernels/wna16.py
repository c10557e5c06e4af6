"""Linear layers with 2, 3, 4 and 8 bit weights, group-wise scales and zero points, and 16-bit activations."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix
from .dispatch import TRITON_DEVICES, check_same_device, is_half, on_device, require_triton
from .packing import check_bits, unpack_gptq, unpack_zeros
from .planes import (
    PackedWeight,
    choose_tile_k,
    new_tickets,
    num_groups,
    pack_planes,
    pack_sz,
    unpack_planes,
    unpack_sz,
)


@torch.library.custom_op(add_op_namespace_prefix("wna16_dequant"), mutates_args=())
def _wna16_dequant(
    qweight: Tensor,
    sz: Tensor,
    perm: Optional[Tensor],
    tickets: Optional[Tensor],
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    tile_k: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = PackedWeight(qweight, sz, perm, tickets, bits, group_size, out_features, in_features, tile_k, dtype)
    return reference.wna16_dequant(weight)


@_wna16_dequant.register_kernel(TRITON_DEVICES)
def _(*args) -> Tensor:
    weight = PackedWeight(*args)
    if not is_half(weight.dtype):
        return reference.wna16_dequant(weight)
    require_triton("wna16_dequant")
    from .wna16_launch import launch_dequant

    with on_device(weight.qweight):
        return launch_dequant(weight)


@_wna16_dequant.register_fake
def _(*args) -> Tensor:
    weight = PackedWeight(*args)
    return weight.qweight.new_empty(weight.out_features, weight.in_features, dtype=weight.dtype)


@torch.library.custom_op(add_op_namespace_prefix("wna16_linear"), mutates_args=())
def _wna16_linear(
    x: Tensor,
    bias: Optional[Tensor],
    qweight: Tensor,
    sz: Tensor,
    perm: Optional[Tensor],
    tickets: Optional[Tensor],
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    tile_k: int,
) -> Tensor:
    weight = PackedWeight(qweight, sz, perm, tickets, bits, group_size, out_features, in_features, tile_k, x.dtype)
    return reference.wna16_linear(x, weight, bias)


@_wna16_linear.register_kernel(TRITON_DEVICES)
def _(x, bias, *packed) -> Tensor:
    weight = PackedWeight(*packed, x.dtype)
    if not is_half(x.dtype):
        return reference.wna16_linear(x, weight, bias)
    require_triton("wna16_linear")
    from .wna16_launch import launch_linear

    with on_device(x):
        return launch_linear(x, weight, bias)


@_wna16_linear.register_fake
def _(x, bias, *packed) -> Tensor:
    return x.new_empty(x.shape[0], PackedWeight(*packed, x.dtype).out_features)


def _save_for_backward(ctx, inputs, output) -> None:
    _, _, qweight, sz, perm, _, *sizes = inputs
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("wna16_linear has no gradient for scales and zero points: packed weights are frozen.")
    ctx.save_for_backward(qweight, sz, perm)
    ctx.sizes = sizes


def _linear_backward(ctx, grad: Tensor):
    qweight, sz, perm = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _wna16_dequant(qweight, sz, perm, None, *ctx.sizes, grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.sum(0)
    return (grad_x, grad_bias, *[None] * 9)


_wna16_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


def wna16_linear(x: Tensor, weight: PackedWeight, bias: Optional[Tensor] = None) -> Tensor:
    """x W^T + bias, for a low-bit W that is never stored in full.

    x        (..., K)   the dtype that `weight` was packed for
    bias     (N,)       same dtype, or None
    returns  (..., N)   same dtype, accumulated in float32

    Differentiable in x and bias; the weight is frozen. Raises ValueError for a wrong dtype, device or size.
    """
    N, K = weight.out_features, weight.in_features
    if x.dtype != weight.dtype and not (x.dtype == torch.float64 and weight.dtype == torch.float32):
        raise ValueError(
            f"x must be {weight.dtype}, the dtype this weight was packed for, got {x.dtype}. "
            "Convert x, or pack the weight again with dtype=x.dtype."
        )
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must end in in_features={K}, got shape {tuple(x.shape)}.")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be ({N},) in {x.dtype}, got {tuple(bias.shape)} in {bias.dtype}.")
    check_same_device(x=x, qweight=weight.qweight, sz=weight.sz, perm=weight.perm, tickets=weight.tickets, bias=bias)
    *packed, _ = weight
    y = _wna16_linear(x.reshape(-1, K), bias, *packed)
    return y.reshape(*x.shape[:-1], N)


def wna16_dequant(weight: PackedWeight) -> Tensor:
    """The weight in full, (N, K) in its own dtype: scale * (q - zero), rounded once."""
    return _wna16_dequant(*weight)


def wna16_pack(
    ints: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    g_idx: Optional[Tensor] = None,
) -> PackedWeight:
    """Integers with their scales and zero points, laid out for the kernels.

    ints        (N, K)   integers in [0, 2^bits - 1]
    scales      (G, N)   floating point
    zeros       (G, N)   integers in [0, 2^bits - 1]
    group_size  consecutive columns sharing a scale, or -1 for the whole row
    dtype       of the activations: float16, bfloat16 or float32
    g_idx       (K,)     group of each column; None for k // group_size

    Raises ValueError for sizes that do not fit together, for a `g_idx` that is not a permutation of equal groups, and
    for scales that overflow or vanish in `dtype`.
    """
    check_bits(bits)
    if ints.ndim != 2:
        raise ValueError(f"ints must be (out_features, in_features), got shape {tuple(ints.shape)}.")
    N, K = ints.shape
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be positive, or -1 for the whole row, got {group_size}.")
    group_size = K if group_size == -1 else min(group_size, K)
    G = -(-K // group_size)
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor.shape != (G, N):
            raise ValueError(f"{name} must be (groups, out_features) = ({G}, {N}), got shape {tuple(tensor.shape)}.")
    for name, tensor in (("ints", ints), ("zeros", zeros)):
        if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < 1 << bits:
            raise ValueError(
                f"{name} must lie in [0, {(1 << bits) - 1}] at {bits} bits, got [{tensor.min()}, {tensor.max()}]."
            )
    check_same_device(ints=ints, scales=scales, zeros=zeros, g_idx=g_idx)
    tile_k = choose_tile_k(bits, K, group_size)
    perm = None if g_idx is None else act_order(g_idx, K, group_size)
    if perm is not None:
        ints = ints[:, perm.long()]
    qweight = pack_planes(ints, bits, tile_k)
    sz = pack_sz(scales, zeros, bits, dtype, num_groups(K, tile_k, group_size))
    return PackedWeight(qweight, sz, perm, new_tickets(N, qweight.device), bits, group_size, N, K, tile_k, dtype)


def wna16_unpack(weight: PackedWeight) -> Tuple[Tensor, Tensor, Tensor]:
    """Integers (N, K) uint8 in the weight's own column order, scales and zero points (G, N) as the kernels see them."""
    ints = unpack_planes(weight.qweight, weight.bits, weight.tile_k, weight.out_features, weight.in_features)
    if weight.perm is not None:
        ints = torch.empty_like(ints).index_copy_(1, weight.perm.long(), ints)
    scales, zeros = unpack_sz(weight.sz, weight.bits, weight.dtype, weight.out_features)
    G = -(-weight.in_features // weight.group_size)
    return ints, scales[:G], zeros[:G]


def gptq_repack(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Optional[Tensor],
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> PackedWeight:
    """A layer of a GPTQ checkpoint, laid out for the kernels.

    qweight      (ceil(K * bits / 32), N)  int32
    qzeros       (G, ceil(N * bits / 32))  int32
    scales       (G, N)                    floating point
    g_idx        (K,)                      group of each column; None for equal consecutive groups
    zero_offset  1 for the older format, 0 for v2

    Raises ValueError, before anything reaches a device, for shapes that do not fit together and for a bad `g_idx`.
    """
    check_bits(bits)
    if scales.ndim != 2 or qweight.ndim != 2 or qzeros.ndim != 2:
        raise ValueError(
            f"qweight, qzeros and scales must be matrices, got shapes {tuple(qweight.shape)}, {tuple(qzeros.shape)} "
            f"and {tuple(scales.shape)}."
        )
    G, N = scales.shape
    K = qweight.shape[0] * 32 // bits if g_idx is None else g_idx.shape[0]
    if qweight.shape[1] != N or qzeros.shape[0] != G:
        raise ValueError(
            f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)} and scales {tuple(scales.shape)} disagree: "
            "expected qweight (words, N), qzeros (G, words) and scales (G, N)."
        )
    ints = unpack_gptq(qweight, bits, K)
    zeros = unpack_zeros(qzeros, bits, N, zero_offset)
    return wna16_pack(ints, scales, zeros, bits, _group_size(K, G, g_idx), dtype, g_idx)


def _group_size(K: int, G: int, g_idx: Optional[Tensor]) -> int:
    """The group size of K columns in G groups. The last group may be short, so several sizes fit; g_idx decides."""
    if g_idx is not None:
        return max(1, int(torch.bincount(_checked_groups(g_idx, K, G)).max()))
    if G < 1 or K % G:
        raise ValueError(f"{K} columns cannot form {G} equal groups. Pass g_idx, the group of each column.")
    return K // G


def act_order(g_idx: Tensor, in_features: int, group_size: int) -> Optional[Tensor]:
    """The (K,) int32 order that sorts columns by group, or None when they are sorted already. Checks `g_idx`.

    Every group must have `group_size` members; only the last may have fewer. Anything else raises ValueError.
    """
    G = -(-in_features // group_size)
    g_idx = _checked_groups(g_idx, in_features, G)
    sizes = torch.bincount(g_idx, minlength=G)
    if bool((sizes[:-1] != group_size).any()) or int(sizes[-1]) != in_features - (G - 1) * group_size:
        raise ValueError(f"g_idx must put {group_size} columns in each group, got sizes {sorted(set(sizes.tolist()))}.")
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx, stable=True).int()


def _checked_groups(g_idx: Tensor, K: int, G: int) -> Tensor:
    """`g_idx` in [0, G), int64. Negative entries count from the last group, as they do in other readers.

    Anything out of range raises ValueError: on a device it would be read out of bounds.
    """
    if g_idx.shape != (K,) or g_idx.is_floating_point():
        raise ValueError(f"g_idx must be ({K},) integers, got {tuple(g_idx.shape)} in {g_idx.dtype}.")
    g_idx = g_idx.long()
    if K and not -G <= int(g_idx.min()) <= int(g_idx.max()) < G:
        raise ValueError(
            f"g_idx must lie in [0, {G}) for {K} columns in {G} groups, got [{int(g_idx.min())}, {int(g_idx.max())}]."
        )
    return torch.where(g_idx < 0, g_idx + G, g_idx)
