"""How the tokens of two models relate to each other: MiniLM's losses, in parts that stay in a core's cache."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_compress.distillation.losses.sums import exact

LOWEST = -1e30  # the score of padding: its probability is 0, and a difference of two of them as well
CPU_SCORE_BYTES = 2**21  # of the scores made at a time: what stays in a core's cache
DEVICE_SCORE_BYTES = 2**28


def distribution_loss(student_scores: Tensor, teacher_scores: Tensor, allowed: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax of scores (B, H, T, S) over the keys: MiniLM, eq. 5 and 7.

    `allowed` (B or 1, 1, 1 or T, S) is True where a query may attend. A mean over heads; the sum over queries takes
    them by `weights` (B, T), 0 for padding.
    """
    student, teacher = exact(student_scores), exact(teacher_scores).detach()
    return _DistributionKL.apply(student, teacher, allowed, weights.to(student.dtype))


def relation_loss(student_states: Tensor, teacher_states: Tensor, num_heads: int, weights: Tensor) -> Tensor:
    """KL(teacher || student) of the relations between the real tokens of states (B, H, T, Dh).

    H and Dh are each model's own: heads are joined and split again into `num_heads` relation heads.

    A mean over relation heads; the sum over tokens takes them by `weights` (B, T), 0 for padding. Scores live for a few
    examples at a time: the gradient is made from them at once.
    """
    student, teacher = (_relation_heads(states, num_heads, weights) for states in (student_states, teacher_states))
    return _RelationKL.apply(student, teacher.detach(), weights.to(student.dtype))


def _relation_heads(states: Tensor, num_heads: int, weights: Tensor) -> Tensor:
    """states (B, H, T, Dh) as (B, R, T, Dr), zero at padding and scaled so that X X^T are the scores of eq. 2."""
    if states.shape[1] != num_heads:
        joined = states.transpose(1, 2).flatten(2)  # (B, T, H * Dh)
        states = joined.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, R, T, Dr)
    padding = (weights == 0)[:, None, :, None]
    return exact(states).masked_fill(padding, 0.0) * states.shape[-1] ** -0.25


class _DistributionKL(torch.autograd.Function):
    """Loss and gradient in one pass over a few examples at a time, whose probabilities stay in the cache."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, allowed: Tensor, weights: Tensor) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros(())
        for part in _parts(student, student.shape[1:]):
            w = weights[part]
            hidden = ~(allowed.expand(len(weights), -1, -1, -1)[part] & (w != 0)[:, None, :, None])
            scores = (x[part].masked_fill(hidden, LOWEST) for x in (student, teacher))
            loss, G = _kl_and_gradient(*scores, w)
            total += loss
            if gradient is not None:
                gradient[part] = G
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None, None


class _RelationKL(torch.autograd.Function):
    """The same from the states that make the scores: memory for scores is what costs, so none are kept."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros(())
        T = student.shape[-2]
        with torch.autocast(student.device.type, enabled=False):
            for part in _parts(student, (student.shape[1], T, T)):
                X, Y, w = student[part], teacher[part], weights[part]
                padding = torch.where(w == 0, LOWEST, 0.0)[:, None, None, :].to(X.dtype)
                loss, G = _kl_and_gradient((X @ X.mT).add_(padding), (Y @ Y.mT).add_(padding), w)
                total += loss
                if gradient is not None:
                    gradient[part] = G @ X + G.mT @ X
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None


def _parts(student: Tensor, scores: Sequence[int]) -> Iterator[slice]:
    """Slices of the batch for which scores of shape (b, *scores) are small enough."""
    score_bytes = CPU_SCORE_BYTES if student.device.type == "cpu" else DEVICE_SCORE_BYTES
    step = max(1, score_bytes // (math.prod(scores) * student.element_size()))
    return (slice(i, i + step) for i in range(0, len(student), step))


def _kl_and_gradient(student_scores: Tensor, teacher_scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the softmax of scores (b, H, T, S), a mean over H, summed by `weights` (b, T); and its gradient."""
    log_q, log_p = student_scores.log_softmax(dim=-1), teacher_scores.log_softmax(dim=-1)
    p = log_p.exp()
    w = weights[:, None, :, None] / student_scores.shape[1]
    loss = (torch.linalg.vecdot(p, log_p.sub_(log_q))[..., None] * w).sum()
    return loss, log_q.exp_().sub_(p).mul_(w)
