"""ATen's kernels for weights of few bits and few tokens: they read the weight once, and little of it.

Each class says which weights it `takes`; the errors are relative, in the Frobenius norm.
"""

import torch
from torch import Tensor

from hf_compress.engines.packed_weight import Stored

INT4_GROUPS = (256, 128, 64, 32)  # what the 4-bit kernel takes


def _int4_group(stored: Stored) -> int | None:
    return next((size for size in INT4_GROUPS if stored.group_size % size == 0), None)


def _whole_tiles(stored: Stored) -> bool:
    return stored.out_features % 16 == 0 and stored.in_features % 32 == 0  # the kernels read beyond other weights


def _pack(q: Tensor, scales: Tensor, shifts: Tensor, group_size: int, size: int) -> tuple[Tensor, Tensor]:
    """The kernel's layout of (q - 8) * scale + shift: q (N, K) in [0, 15], scales and shifts (N, G)."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    pairs = torch.stack([scales, shifts], dim=-1).transpose(0, 1)  # (G, N, 2)
    return packed, pairs.repeat_interleave(group_size // size, dim=0).bfloat16().contiguous()


def _sorted_columns(stored: Stored) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, scales and zeros in float32, and the order of columns that brings those of a group together."""
    weight = stored.weight()
    order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True)
    q = weight.q if order is None else weight.q[:, order]
    return q, weight.scales.float(), weight.zeros.float(), order


def _takes_groups(stored: Stored) -> bool:
    """Whether the 4-bit kernel takes the shape and the groups, which act-order may have left uneven."""
    if not _whole_tiles(stored) or _int4_group(stored) is None:
        return False
    if stored.g_idx is None:
        return True
    counts = stored.g_idx.long().bincount(minlength=stored.num_groups)
    return bool((counts == stored.group_size).all())


class Int4:
    """4-bit weights in groups, bfloat16 activations. Error at most 6e-3. Half a byte a weight.

    Weights of 2 and 3 bit use the middle of the 4-bit grid: the same numbers.
    """

    name, traceable, rounds = "4-bit kernel", True, False

    @staticmethod
    def takes(stored: Stored) -> bool:
        return stored.bits <= 4 and _takes_groups(stored)

    def __init__(self, stored: Stored):
        q, scales, zeros, self.order = _sorted_columns(stored)
        self.group_size = _int4_group(stored)
        self.parts = [
            _pack(*part, stored.group_size, self.group_size) for part in self._parts(q, scales, zeros, stored)
        ]

    @staticmethod
    def _parts(q: Tensor, scales: Tensor, zeros: Tensor, stored: Stored) -> list[tuple[Tensor, Tensor, Tensor]]:
        middle = 2 ** (stored.bits - 1)
        return [(q + (8 - middle), scales, (middle - zeros) * scales)]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        half = (x if self.order is None else x[:, self.order]).bfloat16().contiguous()
        y, *more = [
            torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, self.group_size, pairs)
            for packed, pairs in self.parts
        ]
        for part in more:
            y = y.float().add_(part)
        y = y.to(x.dtype)
        return y if bias is None else y.add_(bias)


class Int8Halves(Int4):
    """8-bit weights in groups as two of 4 bits, q = 16 high + low. Error at most 6e-3. 1 byte a weight."""

    name = "4-bit kernel twice"

    @staticmethod
    def takes(stored: Stored) -> bool:
        return stored.bits == 8 and _takes_groups(stored)

    @staticmethod
    def _parts(q: Tensor, scales: Tensor, zeros: Tensor, stored: Stored) -> list[tuple[Tensor, Tensor, Tensor]]:
        # q - zero = 16 (high - 8) + (low - 8) + (136 - zero)
        return [(q >> 4, 16 * scales, (136 - zeros) * scales), (q & 15, scales, torch.zeros_like(scales))]


class Int8Weights:
    """8-bit weights with one scale a row, bfloat16 activations. Error at most 6e-3. 1 byte a weight."""

    name, traceable, rounds = "8-bit kernel", True, False

    @staticmethod
    def takes(stored: Stored) -> bool:
        return stored.is_8_bit_rows and _whole_tiles(stored)

    def __init__(self, stored: Stored):
        weight = stored.weight()
        scales = weight.scales[:, 0].float()
        self.q, self.scales = (weight.q ^ 128).view(torch.int8), scales.bfloat16()  # q - 128
        shift = (128 - weight.zeros[:, 0].float()) * scales
        self.shift = shift if bool(shift.any()) else None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x.bfloat16().contiguous(), self.q, self.scales)
        if self.shift is not None:  # scale * (q - zero) = scale * (q - 128) + scale * (128 - zero)
            y = y + x.sum(1, keepdim=True, dtype=torch.float32) * self.shift
        y = y.to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)
