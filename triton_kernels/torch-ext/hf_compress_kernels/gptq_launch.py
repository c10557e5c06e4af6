"""Launcher of GPTQ's inner loop."""

from typing import Tuple

import torch
import triton
from torch import Tensor

from .gptq_kernels import gptq_block_kernel

BLOCK_N, NUM_WARPS = 16, 4


def launch_quantize_block(
    weight: Tensor, hinv: Tensor, scale: Tensor, zero: Tensor, maxq: int
) -> Tuple[Tensor, Tensor]:
    N, B = weight.shape
    if B & (B - 1) or not 16 <= B <= 256:
        raise ValueError(f"On a GPU a block has 16, 32, 64, 128 or 256 columns, got {B}.")
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    q = torch.empty(N, B, dtype=torch.uint8, device=weight.device)
    err = torch.empty(N, B, dtype=torch.float32, device=weight.device)
    if N:
        gptq_block_kernel[(triton.cdiv(N, BLOCK_N),)](
            weight,
            hinv.contiguous(),
            scale.contiguous(),
            zero.contiguous(),
            q,
            err,
            N,
            weight.stride(0),
            maxq,
            B=B,
            GROUPS=scale.shape[1],
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return q, err
