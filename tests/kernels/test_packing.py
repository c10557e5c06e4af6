"""Packing against an independent reader of the bit stream, written with numpy."""

import numpy as np
import pytest
import torch
from hf_compress_kernels import packing
from hf_compress_kernels.packing import (
    pack_gptq,
    pack_rows,
    pack_zeros,
    unpack_gptq,
    unpack_rows,
    unpack_zeros,
    words_per_row,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)


def read_bit_stream(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Rows of little-endian int32 words (R, W) -> integers (R, length), one bit at a time."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : length * bits].reshape(len(words), length, bits).astype(np.int64)
    return (fields << np.arange(bits)).sum(-1)


def random_ints(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@BITS
@pytest.mark.parametrize("K", [32, 96, 576, 40, 37], ids="K={}".format)
def test_qweight_is_the_little_endian_bit_stream_along_k(bits, K):
    ints = random_ints(5, K, bits=bits)
    qweight = pack_gptq(ints, bits)
    assert qweight.dtype == torch.int32
    assert qweight.shape == (-(-K * bits // 32), 5)
    np.testing.assert_array_equal(read_bit_stream(qweight.T.numpy(), bits, K), ints.numpy())
    assert torch.equal(unpack_gptq(qweight, bits, K), ints)


def test_eight_four_bit_values_fill_one_word():
    assert pack_gptq(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4).item() == 0x87654321 - (1 << 32)


def test_three_bit_words_split_values_10_and_21():
    ints = torch.zeros(1, 32, dtype=torch.uint8)
    ints[0, 10], ints[0, 21] = 0b101, 0b110
    first, second, third = pack_rows(ints, 3)[0].tolist()
    assert first & 0xFFFFFFFF == 0b01 << 30  # two bits of value 10
    assert second & 0xFFFFFFFF == (0b1 | 0b0 << 31)  # its third bit, and one bit of value 21
    assert third & 0xFFFFFFFF == 0b11


@BITS
@pytest.mark.parametrize("fill", ["zeros", "ones"])
def test_extreme_words_survive(bits, fill):
    ints = torch.full((3, 64), 0 if fill == "zeros" else (1 << bits) - 1, dtype=torch.uint8)
    words = pack_gptq(ints, bits)
    assert (words == (0 if fill == "zeros" else -1)).all()
    assert torch.equal(unpack_gptq(words, bits, 64), ints)


@BITS
@pytest.mark.parametrize("zero_offset", [0, 1], ids=["v2", "v1"])
def test_zeros_of_both_conventions(bits, zero_offset):
    zeros = random_ints(3, 64, bits=bits)
    zeros[0, 0] = 0
    qzeros = pack_zeros(zeros, bits, zero_offset)
    stored = read_bit_stream(qzeros.numpy(), bits, 64)
    np.testing.assert_array_equal((stored + zero_offset) % (1 << bits), zeros.numpy())
    assert torch.equal(unpack_zeros(qzeros, bits, 64, zero_offset), zeros)


def test_symmetric_four_bit_is_7_in_v1_and_8_in_v2():
    zeros = torch.full((1, 8), 8, dtype=torch.uint8)
    assert pack_zeros(zeros, 4, zero_offset=1).item() == 0x77777777
    assert pack_zeros(zeros, 4, zero_offset=0).item() == 0x88888888 - (1 << 32)


@BITS
def test_rows_pack_any_leading_shape(bits):
    ints = random_ints(2, 3, 50, bits=bits)
    words = pack_rows(ints, bits)
    assert words.shape == (2, 3, words_per_row(50, bits))
    assert torch.equal(unpack_rows(words, bits, 50), ints)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_rows(torch.zeros(1, 8, dtype=torch.uint8), 5), "bits must be one of"),
        (lambda: pack_rows(torch.full((1, 8), 16, dtype=torch.uint8), 4), r"must lie in \[0, 15\]"),
        (lambda: pack_rows(torch.full((1, 8), -1), 4), r"must lie in \[0, 15\]"),
        (lambda: pack_gptq(torch.zeros(8, dtype=torch.uint8), 4), "out_features, in_features"),
        (lambda: unpack_gptq(torch.zeros(4, 2, dtype=torch.int32), 4, 64), "take 8 words, got 4"),
        (lambda: pack_zeros(torch.full((1, 8), 16), 4), r"must lie in \[0, 15\]"),
        (lambda: unpack_zeros(torch.zeros(1, 1, dtype=torch.int32), 4, 8, 2), "zero_offset is 1"),
    ],
    ids=["bits", "too-large", "negative", "one-dimensional", "words", "zero-too-large", "offset"],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_floats_are_not_packed():
    with pytest.raises(TypeError, match="Quantize first"):
        pack_rows(torch.zeros(1, 8), 4)


def test_a_single_word_of_a_transposed_row_is_unpacked():
    q = torch.arange(4, dtype=torch.uint8).repeat(3, 1)  # (3, 4): one word a row
    words = pack_rows(q, 8)
    turned = torch.empty(1, 3, dtype=torch.int32).copy_(words.t()).t()  # the same values, with a column's strides
    assert turned.stride(-1) != 1 and torch.equal(unpack_rows(turned, 8, 4), q)


@BITS
@pytest.mark.parametrize("shape", [(384, 384), (2, 3, 16384), (300, 385), (1, 300_000)], ids=str)
def test_many_bytes_are_looked_up_and_few_are_shifted(bits, shape, monkeypatch):
    ints = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    words = pack_rows(ints, bits)
    assert words.numel() * 4 >= packing.LOOKED_UP
    found = unpack_rows(words, bits, shape[-1])
    monkeypatch.setattr(packing, "LOOKED_UP", 1 << 60)
    assert torch.equal(found, ints) and torch.equal(unpack_rows(words, bits, shape[-1]), ints)
