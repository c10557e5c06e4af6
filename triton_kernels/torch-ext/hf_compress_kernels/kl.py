"""Distillation losses: the Kullback-Leibler divergence of two sets of logits, and of two language model heads."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .dispatch import TRITON_DEVICES, check_same_device, float_accumulator, on_device, require_triton

LOGITS_BYTES = 256 * 2**20  # of one float32 chunk of logits in `fused_linear_kl`
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


# One body for every device: matrix products by torch, the loss of a chunk of rows by the operators above.
@torch.library.custom_op(add_op_namespace_prefix("fused_linear_kl"), mutates_args=())
def _fused_linear_kl(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    mask: Optional[Tensor],
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    accumulator = float_accumulator(hidden_s.dtype)
    loss = hidden_s.new_zeros((), dtype=accumulator)
    grad_hidden = torch.zeros_like(hidden_s) if need_hidden else hidden_s.new_empty(0)
    grad_weight = torch.zeros_like(weight_s, dtype=accumulator) if need_weight else weight_s.new_empty(0)
    rows_at_once = max(1, LOGITS_BYTES // (4 * weight_s.shape[0]))
    for start in range(0, hidden_s.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        student, teacher = hidden_s[rows] @ weight_s.t(), hidden_t[rows] @ weight_t.t()  # (chunk, V)
        chunk_mask = None if mask is None else mask[rows]
        losses, lse_s, lse_t = _kl_from_logits(student, teacher, chunk_mask, temperature)
        loss += losses.sum()
        if not (need_hidden or need_weight):
            continue
        grad = _kl_from_logits_grad(torch.ones_like(losses), student, teacher, lse_s, lse_t, chunk_mask, temperature)
        if need_hidden:
            torch.mm(grad, weight_s, out=grad_hidden[rows])
        if need_weight:
            grad_weight += (grad.t() @ hidden_s[rows]).to(accumulator)
    return loss, grad_hidden, grad_weight.to(weight_s.dtype)


@_fused_linear_kl.register_fake
def _(hidden_s, weight_s, hidden_t, weight_t, mask, temperature, need_hidden, need_weight):
    loss = hidden_s.new_empty((), dtype=float_accumulator(hidden_s.dtype))
    grad_hidden = torch.empty_like(hidden_s) if need_hidden else hidden_s.new_empty(0)
    return loss, grad_hidden, torch.empty_like(weight_s) if need_weight else weight_s.new_empty(0)


def _save_gradients(ctx, inputs, output) -> None:
    _, grad_hidden, grad_weight = output
    ctx.needs = inputs[-2:]
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _fused_backward(ctx, grad: Tensor, *_unused):
    grad_hidden, grad_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs
    grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype) if need_hidden else None
    grad_weight = (grad_weight * grad).to(grad_weight.dtype) if need_weight else None
    return grad_hidden, grad_weight, None, None, None, None, None, None


_fused_linear_kl.register_autograd(_fused_backward, setup_context=_save_gradients)


def fused_linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Optional[Tensor] = None,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over rows of T^2 * KL(teacher || student) between two output heads, logits never kept.

    hidden   (..., Ds) and (..., Dt)   states before the head, same leading shape
    weight   (V, Ds) and (V, Dt)       weights of the heads, without bias
    mask     (...)                     bool; False rows count nothing
    returns  ()                        float32 (float64 for float64 states); divide by the rows that count

    Differentiable in the student's states and weight; the gradients are made in the forward pass, one chunk of rows at
    a time, so that the logits of a chunk (at most 256 MiB in float32) are all that is ever held.
    """
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"Student and teacher states must have the same rows, got {tuple(student_hidden.shape)} and "
            f"{tuple(teacher_hidden.shape)}."
        )
    if student_weight.ndim != 2 or teacher_weight.ndim != 2 or student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"The heads must be (V, D) matrices over one vocabulary, got {tuple(student_weight.shape)} and "
            f"{tuple(teacher_weight.shape)}."
        )
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
            raise ValueError(
                f"The {name}'s states and weight disagree: {tuple(hidden.shape)} in {hidden.dtype}, "
                f"{tuple(weight.shape)} in {weight.dtype}."
            )
    if mask is not None and (mask.shape != student_hidden.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(student_hidden.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}.")
    _check_temperature(temperature)
    check_same_device(student_hidden=student_hidden, student_weight=student_weight, teacher_hidden=teacher_hidden,
                      teacher_weight=teacher_weight, mask=mask)  # fmt: skip
    grad_mode = torch.is_grad_enabled()
    loss, _, _ = _fused_linear_kl(
        student_hidden.flatten(0, -2),
        student_weight,
        teacher_hidden.flatten(0, -2).detach(),
        teacher_weight.detach(),
        None if mask is None else mask.reshape(-1),
        float(temperature),
        grad_mode and student_hidden.requires_grad,
        grad_mode and student_weight.requires_grad,
    )
    return loss
