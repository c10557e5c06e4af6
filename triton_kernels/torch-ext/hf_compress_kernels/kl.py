"""A distillation loss: the Kullback-Leibler divergence of two sets of logits."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .dispatch import TRITON_DEVICES, check_same_device, float_accumulator, on_device, require_triton

LOWEST = -1e30  # logits below count as this, so that differences of two of them stay finite


@torch.library.custom_op(add_op_namespace_prefix("kl_from_logits"), mutates_args=())
def _kl_from_logits(
    student: Tensor, teacher: Tensor, mask: Optional[Tensor], temperature: float
) -> Tuple[Tensor, Tensor, Tensor]:
    return _kl_reference(student, teacher, mask, temperature)


@_kl_from_logits.register_kernel(TRITON_DEVICES)
def _(student, teacher, mask, temperature) -> Tuple[Tensor, Tensor, Tensor]:
    if student.dtype == torch.float64:
        return _kl_reference(student, teacher, mask, temperature)
    require_triton("kl_from_logits")
    from .kl_launch import launch_kl

    with on_device(student):
        return launch_kl(student, teacher, mask, temperature)


def _kl_reference(
    student: Tensor, teacher: Tensor, mask: Optional[Tensor], temperature: float
) -> Tuple[Tensor, Tensor, Tensor]:
    s, t = (_scaled(logits, temperature) for logits in (student, teacher))  # (M, V)
    lse_s, lse_t = s.logsumexp(1), t.logsumexp(1)
    # KL = E_t[t - s] - lse_t + lse_s
    loss = ((t - lse_t[:, None]).exp() * (t - s)).sum(1) - lse_t + lse_s
    return _keep(loss * temperature**2, mask), lse_s, lse_t


@_kl_from_logits.register_fake
def _(student, teacher, mask, temperature) -> Tuple[Tensor, Tensor, Tensor]:
    rows = student.new_empty(student.shape[0], dtype=float_accumulator(student.dtype))
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op(add_op_namespace_prefix("kl_from_logits_grad"), mutates_args=())
def _kl_from_logits_grad(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    mask: Optional[Tensor],
    temperature: float,
) -> Tensor:
    return _grad_reference(grad, student, teacher, lse_s, lse_t, mask, temperature)


@_kl_from_logits_grad.register_kernel(TRITON_DEVICES)
def _(grad, student, teacher, lse_s, lse_t, mask, temperature) -> Tensor:
    if student.dtype == torch.float64:
        return _grad_reference(grad, student, teacher, lse_s, lse_t, mask, temperature)
    require_triton("kl_from_logits")
    from .kl_launch import launch_grad

    with on_device(grad):
        return launch_grad(grad, student, teacher, lse_s, lse_t, mask, temperature)


def _grad_reference(grad, student, teacher, lse_s, lse_t, mask, temperature) -> Tensor:
    p_s = (_scaled(student, temperature) - lse_s[:, None]).exp()
    p_t = (_scaled(teacher, temperature) - lse_t[:, None]).exp()
    return _keep((p_s - p_t) * (temperature * grad)[:, None], mask).to(student.dtype)


@_kl_from_logits_grad.register_fake
def _(grad, student, teacher, lse_s, lse_t, mask, temperature) -> Tensor:
    return torch.empty_like(student)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(float_accumulator(logits.dtype)) / temperature).clamp_min(LOWEST)


def _keep(rows: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Zero where the mask is False, whatever stood there."""
    if mask is None:
        return rows
    return torch.where(mask if rows.ndim == 1 else mask[:, None], rows, torch.zeros_like(rows))


def _save_for_backward(ctx, inputs, output) -> None:
    student, teacher, mask, ctx.temperature = inputs
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("kl_from_logits has no gradient for the teacher. Detach its logits.")
    _, lse_s, lse_t = output
    ctx.mark_non_differentiable(lse_s, lse_t)
    ctx.save_for_backward(student, teacher, lse_s, lse_t, mask)


def _kl_backward(ctx, grad: Tensor, *_unused):
    student, teacher, lse_s, lse_t, mask = ctx.saved_tensors
    return _kl_from_logits_grad(grad, student, teacher, lse_s, lse_t, mask, ctx.temperature), None, None, None


_kl_from_logits.register_autograd(_kl_backward, setup_context=_save_for_backward)


def kl_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, mask: Optional[Tensor] = None, temperature: float = 1.0
) -> Tensor:
    """T^2 * KL(teacher || student) of every row, without storing probabilities.

    logits   (..., V)  both of one shape; logits below -1e30, such as -inf, count as -1e30
    mask     (...)     bool; rows where it is False give loss 0 and gradient 0, whatever their logits
    returns  (...)     float32 (float64 for float64 logits)

    Differentiable in the student's logits.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim == 0:
        raise ValueError(
            f"Student and teacher logits must have one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}."
        )
    shape = student_logits.shape[:-1]
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}.")
    _check_temperature(temperature)
    check_same_device(student_logits=student_logits, teacher_logits=teacher_logits, mask=mask)
    V = student_logits.shape[-1]
    mask = None if mask is None else mask.reshape(-1)
    loss, _, _ = _kl_from_logits(student_logits.reshape(-1, V), teacher_logits.reshape(-1, V), mask, float(temperature))
    return loss.reshape(shape)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}.")
