"""Distances of two distributions over a vocabulary, with their gradients written out.

Rows are positions. Each function takes log-probabilities (M, V) of student and teacher, float32 or float64, and returns
the distance of each row (M,) and its gradient to the student's logits (M, V). The memory of both is used up: the
student's holds its probabilities afterwards.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student); gradient p_s - p_t."""
    ratio = log_teacher - log_student
    p_t = log_teacher.exp_()
    distance = torch.linalg.vecdot(p_t, ratio)
    return distance, torch.sub(log_student.exp_(), p_t, out=ratio)


def reverse_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher); gradient p_s (log p_s - log p_t - KL)."""
    ratio = log_student - log_teacher
    p_s = log_student.exp_()
    distance = torch.linalg.vecdot(p_s, ratio)
    return distance, ratio.sub_(distance[:, None]).mul_(p_s)


def jensen_shannon(log_student: Tensor, log_teacher: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s.

    The gradient is (1 - beta) p_s (log p_s - log m - KL(p_s || m)): what m adds cancels out.
    """
    log_m = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    ratio_t, ratio_s = log_teacher - log_m, log_student - log_m
    p_t, p_s = log_teacher.exp_(), log_student.exp_()
    student_to_m = torch.linalg.vecdot(p_s, ratio_s)
    distance = beta * torch.linalg.vecdot(p_t, ratio_t) + (1 - beta) * student_to_m
    return distance, ratio_s.sub_(student_to_m[:, None]).mul_(p_s).mul_(1 - beta)


def top_k_forward_kl(log_student: Tensor, logits: Tensor, classes: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) over the teacher's k largest logits and one class for all others; gradient as above.

    logits, classes  (M, k)
    rest             (M, 1)  log of the sum of exp over the teacher's other logits

    The others get p_s (1 - r_t / r_s), where r are the masses of all others together.
    """
    classes, known, rest = classes.long(), logits.to(log_student.dtype), rest.to(log_student.dtype)
    total = torch.logaddexp(known.logsumexp(dim=-1, keepdim=True), rest)
    log_t, log_r_t = known - total, rest - total  # (M, k), (M, 1)
    log_s = log_student.gather(1, classes)
    p_t, r_t, own = log_t.exp(), log_r_t.exp(), log_s.exp()
    p_s = log_student.exp_()
    # not 1 less the others, which loses what is small
    r_s = p_s.scatter_(1, classes, 0).sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(p_s.dtype).tiny)
    p_s.scatter_(1, classes, own)
    of_rest = torch.where(r_t > 0, r_t * (log_r_t - r_s.log()), 0)
    grad = (p_s * (1 - r_t / r_s)).scatter_(1, classes, own - p_t)
    return (p_t * (log_t - log_s)).sum(dim=-1) + of_rest[:, 0], grad


def drawn_forward_kl(log_student: Tensor, classes: Tensor, shares: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy to the shares of classes drawn from the teacher, less its entropy; gradient p_s - shares.

    classes, shares  (M, k)  shares are 0 where fewer classes were drawn
    entropy          (M, 1)  of the teacher

    In the mean over draws these are KL(teacher || student) and its gradient. Of one draw the distance can be negative.
    """
    shares, classes = shares.to(log_student.dtype), classes.long()
    distance = -torch.linalg.vecdot(shares, log_student.gather(1, classes)) - entropy[:, 0].to(log_student.dtype)
    return distance, log_student.exp_().scatter_add(1, classes, -shares)
