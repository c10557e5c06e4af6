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
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from hf_compress.distillation.layer_map import check_one_stack
from hf_compress.distillation.losses.relations import distribution_loss, relation_loss
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.runs import Run
from hf_compress.distillation.terms import Term, TermOptions
from hf_compress.distillation.two_phases import TwoPhaseConfig, TwoPhaseTrainer
from hf_compress.model.anatomy import anatomy
from hf_compress.model.attention import Attention
from hf_compress.training.state import TrainingState

RELATION_HEAD_SIZE = 16  # of the teacher, in the paper: 48 relation heads for width 768, 64 for 1024
SIGNALS = ("query", "key", "value")


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
