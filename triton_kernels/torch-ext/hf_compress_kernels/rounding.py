"""Rounding inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def round_to_even(x):
    """The nearest integer of a float32, halves to even; beyond +-2^20, which no quantized value reaches, +-2^20.

    Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds, the same everywhere.
    """
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)
    return (x + 12582912.0) - 12582912.0
