"""MiniLM: the student's last layer imitates how the tokens of a teacher's layer relate to each other.

v1, Wang et al., 2020, https://arxiv.org/abs/2002.10957: the distributions of the attention heads, and of the relations
between values; student and teacher need the same number of heads.
v2, Wang et al., 2021, https://arxiv.org/abs/2012.15828: relations between queries, between keys and between values; the
heads are joined and split again into relation heads, so any two models match.

    relation of X = softmax(X X^T / sqrt(d_r))
    loss = KL(teacher's relation || student's relation), a mean over heads and real tokens

Widths may differ, and nothing is learned that is thrown away later. On plain text (`intermediate_share=1`) this is all
there is; for a task, predictions follow in a second phase.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_compress.distillation.layer_map import check_one_stack
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.two_phases import TwoPhaseConfig, TwoPhaseTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.model.attention import Attention
from hf_compress.training.state import TrainingState

RELATION_HEAD_SIZE = 16  # of the teacher, in the paper: 48 relation heads for width 768, 64 for 1024
SIGNALS = ("query", "key", "value")
LOWEST = -1e30  # the score of padding: its probability is 0, and a difference of two of them as well
CPU_SCORE_BYTES = 2**21  # of the scores made at a time: what stays in a core's cache
DEVICE_SCORE_BYTES = 2**28


@dataclass
class RelationOptions(TermOptions):
    version: int = field(
        default=2, metadata={"help": "1: attention distributions and value relations; 2: query, key, value relations."}
    )
    teacher_layer: int | None = field(
        default=None,
        metadata={"help": "Teacher layer to imitate, from 1; the last by default, 19 to 21 is better of 24 layers."},
    )
    relation_heads: int | None = field(
        default=None,
        metadata={
            "help": "Relation heads of version 2; by default as many as fit both models at 16 or more dimensions of "
            "the teacher's each."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {self.version}.")
        if self.version == 1 and self.relation_heads is not None:
            raise ValueError(
                f"relation_heads={self.relation_heads} is for version 2: version 1 compares the heads as they are. "
                "Set version=2, or leave relation_heads out."
            )


@dataclass
class MiniLMConfig(RelationOptions, TwoPhaseConfig):
    intermediate_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the steps spent on relations, before predictions; 0 to 1. 1 is for plain text without "
            "labels."
        },
    )


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


class LastRelations(Term):
    """Relations between tokens in the student's last layer and one of the teacher's.

    For any two encoders or decoders that read the same tokens. Raises ValueError for a teacher layer that is not there,
    for version 1 with unequal heads, and for relation heads that do not divide both models' widths.
    """

    options_class, name = RelationOptions, "minilm"

    def bind(self, student: nn.Module, teacher: nn.Module) -> None:
        super().bind(student, teacher)
        check_one_stack(student, teacher, "MiniLM")
        mine, theirs = anatomy(student).layers, anatomy(teacher).layers
        number = len(theirs) if self.options.teacher_layer is None else self.options.teacher_layer
        if not 1 <= number <= len(theirs):
            raise ValueError(f"teacher_layer must lie between 1 and {len(theirs)}, the teacher's layers, got {number}.")
        self.layers = len(mine) - 1, number - 1
        self.student_signals, self.teacher_signals = ({"attention": [layer]} for layer in self.layers)
        attentions = mine[-1].attention, theirs[number - 1].attention
        if self.options.version == 1:
            _check_equal_heads(*attentions)
            self.num_relation_heads = attentions[0].num_key_value_heads
        else:
            self.num_relation_heads = _num_relation_heads(self.options.relation_heads, *attentions)

    def losses(self, student: Run, teacher: Run, inputs: Mapping, state: TrainingState) -> dict[str, Loss]:
        mine, theirs = student.attention[self.layers[0]], teacher.attention[self.layers[1]]
        weights, unit = self.tokens(mine.query[:, 0], inputs)
        losses = {}
        if self.options.version == 1:
            allowed = mine.allowed & theirs.allowed
            losses["attention_loss"] = distribution_loss(mine.scores, theirs.scores, allowed, weights)
        for signal in SIGNALS if self.options.version == 2 else ("value",):
            states = getattr(mine, signal), getattr(theirs, signal)
            losses[f"{signal}_relation_loss"] = relation_loss(*states, self.num_relation_heads, weights)
        return {name: Loss(loss, unit) for name, loss in losses.items()}


class MiniLMTrainer(TwoPhaseTrainer):
    """Relations first, then predictions."""

    config_class = MiniLMConfig

    def intermediate_terms(self) -> list[Term]:
        return [LastRelations(self.args)]


def _check_equal_heads(mine: Attention, theirs: Attention) -> None:
    heads = [(a.num_heads, a.num_key_value_heads) for a in (mine, theirs)]
    for kind, own, other in zip(("heads", "key-value heads"), *heads, strict=True):
        if own != other:
            raise ValueError(
                f"MiniLM version 1 compares head by head: the student's last layer has {own} {kind}, {theirs.name} of "
                f"the teacher {other}. Give the student as many (hfc.make_student(..., num_attention_heads=...)), or "
                "set version=2, which takes any two."
            )


def _num_relation_heads(wanted: int | None, mine: Attention, theirs: Attention) -> int:
    """How many relation heads divide the joined heads of queries, keys and values of both models."""
    widths = {}
    for who, attention in (("student", mine), ("teacher", theirs)):
        widths[f"queries of the {who}"] = attention.num_heads * attention.head_dim
        widths[f"keys and values of the {who}"] = attention.num_key_value_heads * attention.head_dim
    common = math.gcd(*widths.values())
    if wanted is None:
        most = max(theirs.num_heads * theirs.head_dim // RELATION_HEAD_SIZE, 1)
        return max(n for n in range(1, most + 1) if common % n == 0)
    for what, width in widths.items():
        if wanted < 1 or width % wanted:
            divisors = [n for n in range(1, common + 1) if common % n == 0]
            raise ValueError(
                f"relation_heads must divide the width of the {what}: got relation_heads={wanted}, width {width}. "
                f"Choose one of {divisors}, or leave it out."
            )
    return wanted
