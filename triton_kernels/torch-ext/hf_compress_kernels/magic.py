"""Bit tricks that turn packed integers into 16-bit floats, as PTX and as plain arithmetic.

A float whose exponent field is fixed ("magic", 1024 in float16 and 128 in bfloat16) holds an integer in its mantissa:
magic + q * 2^p is (q << p) | bits of magic. One `lop3` masks the integer of a plane and sets the exponent, for two
weights at once; one fused multiply-add then gives q - zero, exactly:

    (magic + q * 2^p) * 2^-p - (magic * 2^-p + zero) = q - zero

Planes whose integer lies too high for the mantissa are shifted first, several with one shift.
Every string is checked bit for bit against the plain arithmetic in the tests.
"""

from typing import List, NamedTuple, Tuple

from .planes import THIRD_BIT

# The value of a plane lies at bit `position` after moving its word right by `shift` bits.
Place = Tuple[int, int]


class Decoder(NamedTuple):
    """Inline PTX that decodes a pair of words, and what it needs.

    The operands are: one output register per plane, the input words, then one addend register per entry of `positions`,
    -(magic * 2^-p + zero) in both halves.
    """

    asm: str
    constraints: str
    positions: Tuple[int, ...]


def _places(bits: int, bf16: bool) -> List[Place]:
    """Shift and position of every plane of one word."""
    mantissa = 7 if bf16 else 10
    places, shift = [], 0
    for plane in range(8 if bits == 3 else 16 // bits):
        low = plane * (2 if bits == 3 else bits)
        if low + bits - shift > mantissa:
            shift = low
        places.append((shift, low - shift))
    return places


def _bits_of_float(exponent: int, bf16: bool) -> int:
    """2^exponent as two 16-bit floats in a register."""
    half = (exponent + 127) << 7 if bf16 else (exponent + 15) << 10
    return half << 16 | half


# 8-bit integers do not fit the mantissa of bfloat16. Each byte goes into a float32 2^23 + q instead, whose difference
# to 2^23 + zero is exact and fits bfloat16. The addends are -(2^23 + zero) in float32, one for each half.
_BYTES_TO_BF16 = """{
.reg .b32 w;
.reg .f32 a, b;
prmt.b32 w, $2, 0x4b000000, 0x7440;
mov.b32 a, w;
prmt.b32 w, $2, 0x4b000000, 0x7442;
mov.b32 b, w;
add.rn.f32 a, a, $3;
add.rn.f32 b, b, $4;
cvt.rn.bf16x2.f32 $0, b, a;
prmt.b32 w, $2, 0x4b000000, 0x7441;
mov.b32 a, w;
prmt.b32 w, $2, 0x4b000000, 0x7443;
mov.b32 b, w;
add.rn.f32 a, a, $3;
add.rn.f32 b, b, $4;
cvt.rn.bf16x2.f32 $1, b, a;
}"""


def decoder(bits: int, bf16: bool) -> Decoder:
    """The decoder of `bits`-bit planes for float16 or bfloat16."""
    if bf16 and bits == 8:
        return Decoder(_BYTES_TO_BF16, "=&r,=&r,r,f,f", ())
    magic = 0x43004300 if bf16 else 0x64006400
    places = _places(bits, bf16)
    words = 2 if bits == 3 else 1
    planes = len(places) * words
    inputs = planes  # number of the first input operand
    positions = tuple(sorted({position for _, position in places}))
    first_addend = inputs + (3 if bits == 3 else 1)
    lines = ["{", ".reg .b32 w, t;"]
    for word in range(words):
        source, shifted = f"${inputs + word}", 0
        for j, (shift, position) in enumerate(places):
            out = f"${word * len(places) + j}"
            if shift != shifted:
                lines.append(f"shr.b32 w, ${inputs + word}, {shift};")
                source, shifted = "w", shift
            field = ((1 << (2 if bits == 3 else bits)) - 1) << position
            lines.append(f"lop3.b32 {out}, {source}, {field << 16 | field:#010x}, {magic:#010x}, 0xea;")
            if bits == 3:
                lines += _third_bit(out, f"${inputs + 2}", THIRD_BIT[word * 8 + j], position + 2)
            addend = f"${first_addend + positions.index(position)}"
            scale = f"{_bits_of_float(-position, bf16):#010x}"
            kind = "bf16x2" if bf16 else "f16x2"
            lines.append(f"mov.b32 t, {scale};")
            lines.append(f"fma.rn.{kind} {out}, {out}, t, {addend};")
    lines.append("}")
    constraints = ["=&r"] * planes + ["r"] * (first_addend - inputs + len(positions))
    return Decoder("\n".join(lines), ",".join(constraints), positions)


def _third_bit(out: str, source: str, at: int, wanted: int) -> List[str]:
    """Or the bit `at` of `source` into bit `wanted` of `out`, in both halves."""
    mask = 1 << wanted | 1 << wanted + 16
    if at == wanted:
        return [f"lop3.b32 {out}, {source}, {mask:#010x}, {out}, 0xea;"]
    move = f"shr.b32 t, {source}, {at - wanted};" if at > wanted else f"shl.b32 t, {source}, {wanted - at};"
    return [move, f"lop3.b32 {out}, t, {mask:#010x}, {out}, 0xea;"]
