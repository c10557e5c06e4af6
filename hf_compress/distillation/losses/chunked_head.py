"""Cross entropy and distance to a teacher from hidden states, a few positions at a time: no logits are kept.

The gradients are made in the forward pass, chunk by chunk, so that the heads run once, as they do without chunks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.distillation.losses.divergences import Divergence, forward_kl, top_k_forward_kl
from hf_compress.distillation.teachers.cached_teacher import complete
from hf_compress.engines.ops import kl_from_logits

Known = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of a teacher that is known in part

LOWEST = -1e30  # a logit of -inf counts as this, so that differences of two of them stay finite


class HeadLosses(NamedTuple):
    """total carries the gradient of `task_weight * task + soft_weight * soft`; all are sums over positions."""

    total: Tensor
    task: Tensor
    soft: Tensor


def head_losses(
    states: Tensor,
    head: nn.Linear,
    teacher: Sequence[Tensor],
    teacher_head: nn.Module | None,
    labels: Tensor | None,
    divergence: Divergence,
    *,
    temperature: float,
    task_weight: float,
    soft_weight: float,
    chunk_size: int,
    known: Known = top_k_forward_kl,
) -> HeadLosses:
    """The losses of positions with hidden states (M, Ds) under the student's head.

    teacher  with `teacher_head`: its hidden states (M, Dt), alone in the sequence. Without: what a cache holds, its
             logits (M, V), or three tensors of which `known` makes the distance at temperature 1: `top_k_forward_kl`
             of the largest logits, `drawn_forward_kl` of draws. Other temperatures are for the former.

    The distance, times temperature^2, is over the classes that both have; the cross entropy to `labels` (M,) over all
    of the student's. Sums are float32 (float64 for float64 states). Differentiable in the student's states, weight
    and bias, through `total` alone.
    """
    device = states.device.type
    is_mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else head.weight.dtype
    of_teacher = _as_they_are if teacher_head is None else _logits_of(teacher_head, dtype)
    step = _Step(of_teacher, divergence, known, temperature, task_weight, soft_weight)
    needs_gradient = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        return HeadLosses(
            *_ChunkedHead.apply(
                states, head.weight, head.bias, tuple(teacher), labels, step, chunk_size, dtype, needs_gradient
            )
        )


class _Step(NamedTuple):
    """The losses of one chunk, and their gradient to its logits."""

    teacher_logits: Callable[[Tensor], Tensor]
    divergence: Divergence
    known: Known
    temperature: float
    task_weight: float
    soft_weight: float

    def __call__(
        self, logits: Tensor, teacher: Sequence[Tensor], labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Uses up `logits`."""
        if len(teacher) == 3 and self.temperature == 1:
            return self._at_once(logits, teacher, labels)
        teacher = self._all_logits(teacher, logits)
        classes = min(logits.shape[-1], teacher.shape[-1])  # beyond it is padding of a vocabulary
        if self.temperature == 1 and classes == logits.shape[-1] and not self._is_fused(logits):
            return self._at_once(logits, teacher[:, :classes], labels)
        soft, grad = self._soft(logits[:, :classes], teacher[:, :classes])
        grad = F.pad(grad.mul_(self.soft_weight), (0, logits.shape[-1] - classes))
        task = soft.new_zeros(())
        if labels is not None:
            log_p = logits.log_softmax(dim=-1)
            task = F.nll_loss(log_p, labels, reduction="sum")
            grad.add_(log_p.exp_(), alpha=self.task_weight)
            grad[torch.arange(len(labels), device=labels.device), labels] -= self.task_weight
        return task, soft, grad

    def _at_once(
        self, logits: Tensor, teacher: Tensor | Sequence[Tensor], labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """At temperature 1 cross entropy and distance are of the same probabilities: one softmax serves both."""
        log_student = logits.clamp_(min=LOWEST).log_softmax(dim=-1)
        task = logits.new_zeros(())
        own = None if labels is None else log_student.gather(1, labels[:, None])  # (m, 1), before it is used up
        if isinstance(teacher, Tensor):
            distance, grad = self.divergence(log_student, teacher.clamp_(min=LOWEST).log_softmax(dim=-1))
        else:
            distance, grad = self.known(log_student, *teacher)
        grad.mul_(self.soft_weight)
        if own is not None:
            task = -own.sum()
            grad.add_(log_student, alpha=self.task_weight)  # probabilities by now
            grad.scatter_add_(1, labels[:, None], grad.new_full((len(grad), 1), -self.task_weight))
        return task, distance.sum(), grad

    def _soft(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        T = self.temperature
        if self._is_fused(student):
            return fused_forward_kl(student, teacher, T)
        log_student, log_teacher = ((z / T).clamp_(min=LOWEST).log_softmax(dim=-1) for z in (student, teacher))
        distance, grad = self.divergence(log_student, log_teacher)
        return T**2 * distance.sum(), grad.mul_(T)

    def _all_logits(self, teacher: Sequence[Tensor], logits: Tensor) -> Tensor:
        if len(teacher) == 3:
            return complete(*teacher, logits, classes=logits.shape[-1]).to(logits.dtype)
        return self.teacher_logits(*teacher).to(logits.dtype)  # (m, Vt)

    def _is_fused(self, student: Tensor) -> bool:
        return self.divergence is forward_kl and student.is_cuda


def fused_forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`forward_kl` of logits by the fused operator, which stores no probabilities: the sum, and its gradient."""
    with torch.enable_grad():
        student = student.detach().requires_grad_()
        loss = kl_from_logits(student, teacher, temperature=temperature).sum()
        (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def _logits_of(head: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if type(head) is nn.Linear:  # cast once, not for each chunk
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        return lambda states: F.linear(states.to(dtype), weight, bias)
    return head.forward


def _as_they_are(logits: Tensor) -> Tensor:
    return logits.clone()  # what a chunk is given is used up


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, teacher, labels, step, chunk_size, dtype, needs_gradient):
        accumulator = torch.promote_types(dtype, torch.float32)
        own, own_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        task, soft = (states.new_zeros((), dtype=accumulator) for _ in range(2))
        wanted = [needs_gradient and needed for needed in ctx.needs_input_grad[:3]]  # a frozen head's is not made
        grads = [
            torch.zeros_like(t, dtype=accumulator) if t is not None and needed else None
            for t, needed in zip((states, weight, bias), wanted, strict=True)
        ]
        for start in range(0, len(states), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = states[rows].to(dtype)
            logits = F.linear(chunk, own, own_bias).to(accumulator)  # (m, V)
            of_task, of_soft, grad = step(
                logits, [one[rows] for one in teacher], None if labels is None else labels[rows]
            )
            del logits
            task += of_task
            soft += of_soft
            low = grad.to(dtype)
            of_states, of_weight, of_bias = grads
            if of_states is not None:
                of_states[rows] = low @ own
            if of_weight is not None and dtype == accumulator:
                of_weight.addmm_(low.T, chunk)
            elif of_weight is not None:
                of_weight += low.T @ chunk
            if of_bias is not None:
                of_bias += grad.sum(dim=0)
        ctx.grads, ctx.dtypes = grads, [None if t is None else t.dtype for t in (states, weight, bias)]
        ctx.mark_non_differentiable(task, soft)
        return step.task_weight * task + step.soft_weight * soft, task, soft

    @staticmethod
    def backward(ctx, upstream, *_unused):
        grads = [
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 6
