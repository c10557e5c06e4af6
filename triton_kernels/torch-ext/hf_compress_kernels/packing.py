"""Bit packing of GPTQ checkpoints: little-endian bit streams in int32 words.

Value i of a row takes bits [i * bits, (i + 1) * bits) of the row's stream, lowest bit first; word w holds bits
[32 w, 32 w + 32). At 3 bit, 32 values fill 3 words and two of them straddle a word boundary. A row whose length
does not fill its last word is padded with zero bits.

    weights      (N, K)  ->  qweight (ceil(K * bits / 32), N), packed along K
    zero points  (G, N)  ->  qzeros (G, ceil(N * bits / 32)), packed along N
    embeddings   (V, D)  ->  (V, ceil(D * bits / 32)), packed along the row

The older GPTQ format (v1) stores each zero point minus one; this is the only module that knows: pass
`zero_offset=1` for it and 0 for v2. The subtraction wraps: a zero point of 0 is stored as 2^bits - 1, and read back.
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
WORD = 32  # bits per stored word
LOOKED_UP = 16384  # bytes, from which on a table of all values of a byte is worth its making


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}.")


def words_per_row(length: int, bits: int) -> int:
    """Number of int32 words that `length` values of `bits` bits take."""
    check_bits(bits)
    return -(-length * bits // WORD)


def pack_rows(ints: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    ints     (..., D)                        uint8 or another integer dtype, each in [0, 2^bits - 1]
    returns  (..., ceil(D * bits / 32))      int32
    """
    check_bits(bits)
    if ints.is_floating_point() or ints.dtype == torch.bool:
        raise TypeError(f"Expected integers to pack, got {ints.dtype}. Quantize first, then convert to torch.uint8.")
    _check_range(ints, bits, "Values to pack")
    length = ints.shape[-1]
    padded = torch.nn.functional.pad(ints, (0, -length % WORD)).unflatten(-1, (-1, WORD))  # (..., U, 32)
    words = torch.zeros(*padded.shape[:-1], bits, dtype=torch.int64, device=ints.device)  # (..., U, bits)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        value = padded[..., i].long()
        words[..., word] |= value << shift
        if shift + bits > WORD:
            words[..., word + 1] |= value >> (WORD - shift)
    words = words & 0xFFFFFFFF
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return words.flatten(-2)[..., : words_per_row(length, bits)].contiguous()


def unpack_rows(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_rows`.

    words    (..., ceil(length * bits / 32))  int32
    returns  (..., length)                    uint8
    """
    check_bits(bits)
    if words.dtype != torch.int32:
        raise TypeError(f"Packed words must be torch.int32, got {words.dtype}.")
    expected = words_per_row(length, bits)
    if words.shape[-1] != expected:
        raise ValueError(
            f"{length} values of {bits} bits take {expected} words, got {words.shape[-1]} (shape {tuple(words.shape)})."
        )
    words = torch.nn.functional.pad(words, (0, -expected % bits)) if WORD % bits else words
    if words.stride(-1) != 1:  # of a dimension of size one, which `contiguous` leaves
        words = words.clone(memory_format=torch.contiguous_format)
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets[..., :length].contiguous()
    if octets.is_cpu and octets.numel() >= LOOKED_UP and not torch.compiler.is_compiling():
        return _looked_up(octets, bits)[..., :length].contiguous()
    if WORD % bits == 0:  # no value crosses a byte
        parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    else:  # 3 bit: three bytes hold eight values
        first, second, third = octets.view(*octets.shape[:-1], -1, 3).int().unbind(-1)  # (..., U * 4) each
        stream = first | second << 8 | third << 16
        parts = [((stream >> shift) & 7).to(torch.uint8) for shift in range(0, 24, 3)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :length].contiguous()


def _looked_up(octets: Tensor, bits: int) -> Tensor:
    """The values (..., B * 8 / bits) of bytes (..., B): of each byte at once, at 3 bit of each half of three bytes."""
    if WORD % bits == 0:
        keys = octets.int()
    else:
        first, second, third = octets.view(*octets.shape[:-1], -1, 3).int().unbind(-1)
        keys = torch.stack((first | (second & 15) << 8, second >> 4 | third << 4), dim=-1)
    count = 8 // bits if WORD % bits == 0 else 4
    every = torch.arange(1 << bits * count, dtype=torch.int32)
    table = torch.stack([(every >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(count)], dim=-1)
    table = table.view({2: torch.int16, 4: torch.int32}[count]).flatten()
    return table.index_select(0, keys.flatten()).view(torch.uint8).view(*octets.shape[:-1], -1)


def pack_gptq(ints: Tensor, bits: int) -> Tensor:
    """Weights (N, K), values in [0, 2^bits - 1], as a GPTQ `qweight`: int32 (ceil(K * bits / 32), N), packed along K.

    Other readers of the format want K to fill its words: check `K * bits % 32 == 0` before writing for them.
    """
    if ints.ndim != 2:
        raise ValueError(f"Weights to pack must be (out_features, in_features), got shape {tuple(ints.shape)}.")
    return pack_rows(ints, bits).t().contiguous()


def unpack_gptq(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_gptq`: uint8 (N, in_features)."""
    if qweight.ndim != 2:
        raise ValueError(f"qweight must be (in_features * bits / 32, out_features), got shape {tuple(qweight.shape)}.")
    return unpack_rows(qweight.t(), bits, in_features)


def pack_zeros(zeros: Tensor, bits: int, zero_offset: int = 0) -> Tensor:
    """Zero points (G, N) in [0, 2^bits - 1] as a GPTQ `qzeros`: int32 (G, ceil(N * bits / 32)), packed along N."""
    _check_zero_offset(zero_offset)
    _check_range(zeros, bits, "Zero points")
    return pack_rows((zeros.int() - zero_offset) & ((1 << bits) - 1), bits)


def unpack_zeros(qzeros: Tensor, bits: int, out_features: int, zero_offset: int = 0) -> Tensor:
    """The inverse of `pack_zeros`: uint8 (G, out_features)."""
    _check_zero_offset(zero_offset)
    return (unpack_rows(qzeros, bits, out_features) + zero_offset) & ((1 << bits) - 1)


def _check_range(ints: Tensor, bits: int, what: str) -> None:
    if ints.numel() == 0:
        return
    low, high, maxq = int(ints.min()), int(ints.max()), (1 << bits) - 1
    if low < 0 or high > maxq:
        raise ValueError(f"{what} must lie in [0, {maxq}] to fit {bits} bits, got [{low}, {high}].")


def _check_zero_offset(zero_offset: int) -> None:
    if zero_offset not in (0, 1):
        raise ValueError(f"zero_offset is 1 for the older GPTQ format and 0 for v2, got {zero_offset}.")
