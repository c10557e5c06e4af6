"""Every decoder, one PTX instruction after the other on random words, against plain integer arithmetic."""

import re

import numpy as np
import pytest
import torch
from hf_compress_kernels.magic import decoder
from hf_compress_kernels.planes import THIRD_BIT, magic


def halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """uint32 (n,) as (n, 2) 16-bit floats, low half first."""
    return torch.from_numpy(words.astype("<u4").view("<i2").reshape(-1, 2).copy()).view(dtype)


def as_words(pairs: torch.Tensor) -> np.ndarray:
    return pairs.contiguous().view(torch.int16).numpy().view("<u4").reshape(-1).astype(np.uint64)


def fma_once_rounded(a, b, c, dtype):
    """a * b + c rounded once: the products and sums of 16-bit floats here are exact in float64."""
    return (a.double() * b.double() + c.double()).to(dtype)


def run_ptx(asm: str, registers: dict) -> dict:
    """Execute the few instructions that the decoders use. Registers hold uint64 arrays of 32-bit values."""

    def value(name: str):
        return registers[name] if name in registers else np.uint64(int(name, 0))

    for statement in re.sub(r"[{}]", "", asm).split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        op, _, rest = statement.partition(" ")
        out, *args = [part.strip() for part in rest.split(",")]
        args = [value(a) for a in args]
        if op == "lop3.b32":
            assert int(args[3]) == 0xEA
            result = (args[0] & args[1]) | args[2]
        elif op == "shr.b32":
            result = args[0] >> args[1]
        elif op == "shl.b32":
            result = (args[0] << args[1]) & np.uint64(0xFFFFFFFF)
        elif op == "mov.b32":
            result = args[0] + np.zeros_like(registers["$in"])
        elif op == "prmt.b32":
            pool = [(args[0] >> np.uint64(8 * i)) & np.uint64(255) for i in range(4)]
            pool += [(args[1] >> np.uint64(8 * i)) & np.uint64(255) for i in range(4)]
            result = sum(pool[int(args[2]) >> 4 * i & 7] << np.uint64(8 * i) for i in range(4))
        elif op == "add.rn.f32":
            a, b = (x.astype("<u4").view("<f4") for x in args)
            result = (a + b).astype("<f4").view("<u4").astype(np.uint64)
        elif op == "cvt.rn.bf16x2.f32":  # the first source goes into the upper half
            high, low = (torch.from_numpy(x.astype("<u4").view("<f4").copy()).bfloat16() for x in args)
            result = as_words(torch.stack([low, high], dim=-1))
        elif op in ("fma.rn.f16x2", "fma.rn.bf16x2"):
            dtype = torch.bfloat16 if "bf16" in op else torch.float16
            a, b, c = (halves(np.broadcast_to(x, registers["$in"].shape), dtype) for x in args)
            result = as_words(fma_once_rounded(a, b, c, dtype))
        else:
            raise AssertionError(f"unknown instruction {op}")
        registers[out] = result
    return registers


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, -1], ids=["zero=0", "zero=1", "zero=max"])
def test_decoder_equals_integer_arithmetic(bits, dtype, zero):
    zero %= 1 << bits
    asm, constraints, positions = decoder(bits, dtype == torch.bfloat16)
    generator = np.random.default_rng(bits)
    words = [generator.integers(0, 1 << 32, 4096, dtype=np.uint64) for _ in range(3 if bits == 3 else 1)]
    words[0][:2] = 0, 0xFFFFFFFF
    planes = 16 if bits == 3 else 16 // bits
    registers = {f"${planes + i}": word for i, word in enumerate(words)}
    registers["$in"] = words[0]
    first = planes + len(words)
    if positions:
        m = magic(bits, dtype)
        for i, position in enumerate(positions):
            addend = torch.full((4096, 2), -(m / 2**position + zero), dtype=torch.float64)
            assert torch.equal(addend.to(dtype).double(), addend), "the addend must be exact"
            registers[f"${first + i}"] = as_words(addend.to(dtype))
    else:
        addend = np.full(4096, -(2.0**23 + zero), dtype="<f4").view("<u4").astype(np.uint64)
        registers |= {f"${first}": addend, f"${first + 1}": addend}
    assert len(constraints.split(",")) == first + (len(positions) or 2)
    run_ptx(asm, registers)

    for plane in range(planes):
        for half in range(2):
            words16 = [(word >> np.uint64(16 * half)).astype(np.int64) & 0xFFFF for word in words]
            if bits == 3:
                q = words16[plane // 8] >> 2 * (plane % 8) & 3 | (words16[2] >> THIRD_BIT[plane] & 1) << 2
            else:
                q = words16[0] >> bits * plane & (1 << bits) - 1
            decoded = halves(registers[f"${plane}"], dtype)[:, half].double().numpy()
            np.testing.assert_array_equal(decoded, q - zero)
