"""The losses of distillation: functions of tensors, each a sum over its items; the trainer divides, once.

B examples, T tokens, D hidden size, C classes or vocabulary, H heads. `weights` are 0 for padding, which never
contributes. Sums are taken in float32 (float64 for float64 inputs) whatever the dtype of the inputs.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engines.ops import kl_from_logits

Unit = Literal["example", "token", "label", "prediction"]
NO_PROBABILITY = -9e3  # below it lies no logit, only what stands for nothing: padding, classes that a cache lacks


class Loss(NamedTuple):
    """A weighted loss, summed over its items, and what an item is.

    example: one row of the batch.   token: a real token of the input.
    prediction: what has logits that count: an example, or a position (with labels: where they are not -100).
    label: a prediction that has a label (not -100, and within the text for spans).
    """

    sum: Tensor
    per: Unit
    weight: float = 1.0


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy to the teacher's soft targets, less their entropy: T^2 * KL(teacher || student).

    Logits are (..., C). T^2 keeps the gradient's size when the temperature changes. Hinton et al., 2015,
    https://arxiv.org/abs/1503.02531
    """
    return kl_from_logits(student_logits, teacher_logits, temperature=temperature).sum()


def binary_soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`soft_loss` of examples with several labels: each of the C logits is a yes or no of its own, averaged over C."""
    student, teacher = exact(student_logits) / temperature, exact(teacher_logits) / temperature
    p = teacher.sigmoid()
    yes = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (yes + no).sum() / student.shape[-1]


def drawn_loss(student_logits: Tensor, classes: Tensor, shares: Tensor, entropy: Tensor) -> Tensor:
    """Cross-entropy of logits (items, C) to the shares (items, k) of classes drawn from the teacher, less its entropy.

    In the mean over draws it is `soft_loss` at temperature 1, and its gradient that of it. entropy (items, 1)
    """
    log_student = F.log_softmax(exact(student_logits), dim=-1).gather(-1, classes)
    return -(shares * log_student).sum() - entropy.sum()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (items, C) to the labels (items,), summed."""
    return F.cross_entropy(exact(logits), labels, reduction="sum")


def span_loss(start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Cross-entropy of logits (B, T) to the first and last token of each answer, halved and summed over the examples.

    As in Transformers, positions beyond the text are passed over, and negative ones are the first token.
    """
    T = start_logits.shape[1]
    pairs = (start_logits, starts), (end_logits, ends)
    sums = [
        F.cross_entropy(exact(z), at.flatten().clamp(0, T).to(z.device), ignore_index=T, reduction="sum")
        for z, at in pairs
    ]
    return (sums[0] + sums[1]) / 2


def logit_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared distance of the logits (..., C), averaged over C. Ba and Caruana, 2014, https://arxiv.org/abs/1312.6184"""
    return (exact(student_logits) - exact(teacher_logits)).square().mean(dim=-1).sum()


def hidden_state_loss(student_states: Tensor, teacher_states: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of hidden states (B, T, D), averaged over D and summed over tokens by `weights` (B, T)."""
    distance = F.mse_loss(exact(student_states), exact(teacher_states), reduction="none").mean(dim=-1)  # (B, T)
    return (distance * weights).sum()


def attention_loss(student_scores: Tensor, teacher_scores: Tensor, allowed: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of attention scores before softmax (B, H, T, S): TinyBERT, eq. 7.

    `allowed` (B or 1, 1, T, S) is True where a query may attend. Each query's distance is averaged over its allowed
    keys and the heads; the sum over the queries takes them by `weights` (B, T), 0 for padding.
    """
    distance = F.mse_loss(exact(student_scores), exact(teacher_scores), reduction="none")
    distance = distance.mean(dim=1, keepdim=True)  # (B, 1, T, S)
    keys = allowed.sum(dim=-1).clamp(min=1)  # (B or 1, 1, T)
    queries = distance.masked_fill(~allowed, 0.0).sum(dim=-1) / keys  # (B, 1, T)
    return (queries.squeeze(1) * weights).sum()


def noisy_teacher(teacher_logits: Tensor, sigma: float, share: float, form: str = "relative") -> Tensor:
    """Disturb the logits (B, ..., C) of a random `share` of the examples: (1 + xi) z, or z + xi; xi ~ N(0, sigma^2).

    What has no probability keeps none. Sau and Balasubramanian, 2016, https://arxiv.org/abs/1610.09650 (relative);
    additive in later surveys.
    """
    chosen = torch.rand(len(teacher_logits), device=teacher_logits.device) < share
    noise = sigma * torch.randn_like(teacher_logits) * chosen.view(-1, *[1] * (teacher_logits.dim() - 1))
    noise = noise.masked_fill(teacher_logits < NO_PROBABILITY, 0.0)
    return teacher_logits * (1 + noise) if form == "relative" else teacher_logits + noise


def exact(tensor: Tensor) -> Tensor:
    """`tensor` in float32 where it is less precise, so that sums over it are taken in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
