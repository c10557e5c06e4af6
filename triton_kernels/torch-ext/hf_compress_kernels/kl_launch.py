"""Launchers of the loss kernels."""

import math
from typing import Optional, Tuple

import torch
import triton
from torch import Tensor

from .dispatch import INTERPRET
from .kl_kernels import kl_grad_kernel, kl_kernel

LOWEST = -1e30  # as in kl.py
BLOCK_V, NUM_WARPS = 2048, 4  # 16 columns in every thread: five running values of each stay in registers


def launch_kl(
    student: Tensor, teacher: Tensor, mask: Optional[Tensor], temperature: float
) -> Tuple[Tensor, Tensor, Tensor]:
    M, V = student.shape
    loss, lse_s, lse_t = (torch.empty(M, dtype=torch.float32, device=student.device) for _ in range(3))
    if M == 0:
        return loss, lse_s, lse_t
    student, teacher = _rows(student), _rows(teacher)
    kl_kernel[(M,)](
        student,
        teacher,
        loss if mask is None else _bytes(mask),
        loss,
        lse_s,
        lse_t,
        V,
        student.stride(0),
        teacher.stride(0),
        math.log2(math.e) / temperature,
        temperature**2,
        HAS_MASK=mask is not None,
        LOWEST=LOWEST,
        BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)),
        num_warps=NUM_WARPS,
    )
    return loss, lse_s, lse_t


def launch_grad(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    mask: Optional[Tensor],
    temperature: float,
) -> Tensor:
    M, V = student.shape
    dtype = student.dtype
    student, teacher = _rows(student), _rows(teacher)
    out = torch.empty(M, V, dtype=student.dtype, device=student.device)
    if M == 0:
        return out.to(dtype)
    block = min(BLOCK_V, triton.next_power_of_2(V))
    kl_grad_kernel[(M, triton.cdiv(V, block))](
        grad.contiguous(),
        student,
        teacher,
        lse_s,
        lse_t,
        grad if mask is None else _bytes(mask),
        out,
        V,
        student.stride(0),
        teacher.stride(0),
        math.log2(math.e) / temperature,
        temperature,
        HAS_MASK=mask is not None,
        LOWEST=LOWEST,
        BLOCK_V=block,
        num_warps=NUM_WARPS,
    )
    return out.to(dtype)


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)  # the kernels read one row's byte after the other


def _rows(logits: Tensor) -> Tensor:
    if INTERPRET:  # bfloat16 arithmetic is wrong there
        logits = logits.float()
    return logits if logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1] else logits.contiguous()
