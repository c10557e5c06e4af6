"""MarginMSE: a cross-encoder holds one passage above another for a query by as much as its teacher does. No labels.

Hofstätter et al., 2020, https://arxiv.org/abs/2010.02666

    loss = mean over queries q and their negatives n of ((s(q, p) - s(q, n)) - (t(q, p) - t(q, n)))^2

s and t are the logits of student and teacher for a query and a passage, p the positive one. Margins leave the student
its own scale's zero: only what orders the passages is learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.losses.sums import Loss, exact
from hf_compress.distillation.runs import Run
from hf_compress.distillation.teachers.several_teachers import teachers_of
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.reading import num_positions_of
from hf_compress.model.tasks import plain_model

COLUMNS = ("query", "positive", "negative")
CANDIDATES = "candidates"  # of the batch: how many passages each query has, one number a row
OF_SENTENCE_TRANSFORMERS = ("sentence_transformers", "sbert_ce_default_activation_function")  # entries of a config


def margin_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the margins of scores (B, C), the positive first: mean over negatives, summed over B."""
    mine, theirs = (scores[:, :1] - scores[:, 1:] for scores in (exact(student), exact(teacher)))  # (B, C - 1)
    return (mine - theirs).square().mean(dim=-1).sum()


@dataclass(frozen=True)
class CandidatesCollator:
    """Rows with `query`, `positive` and `negative`, a text or a list of them, as pairs (B * C, T), the positive first.

    Raises ValueError for queries of a batch with different numbers of passages.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        passages = [[row["positive"], *negatives_of(row)] for row in rows]
        sizes = {len(one) for one in passages}
        if len(sizes) != 1 or sizes == {1}:
            raise ValueError(f"Each query needs as many negatives, one or more, but they have {sizes_text(sizes)}.")
        (size,) = sizes
        queries = [row["query"] for row in rows for _ in range(size)]
        flat = [passage for one in passages for passage in one]
        batch = self.tokenizer(
            queries, flat, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**batch, CANDIDATES: torch.full((len(flat),), size)}


def negatives_of(row: Mapping) -> list[str]:
    return [row["negative"]] if isinstance(row["negative"], str) else list(row["negative"])


def sizes_text(sizes: set[int]) -> str:
    return " and ".join(str(size - 1) for size in sorted(sizes))


@dataclass
class MarginMSEConfig(DistillationConfig):
    alpha: float = field(default=1.0, metadata={"help": "Stays 1: margins are all that is learned, not labels."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a query and a passage together, at most."})

    def __post_init__(self):
        super().__post_init__()
        if self.alpha != 1:
            raise ValueError(f"MarginMSE learns from the teacher alone: alpha stays 1, got {self.alpha}.")
        if self.max_length < 3:
            raise ValueError(f"max_length must leave room for a query and a passage, got {self.max_length}.")


class MarginMSETrainer(DistillationTrainer):
    """Distils a cross-encoder, a sequence classifier with one label, from rows of a query and passages.

    `train_dataset` has the columns `query`, `positive` and `negative`, a text or a list of as many for every row, and
    `processing_class` reads them. What is saved opens in `CrossEncoder(folder)`, and scores as the teacher's does.
    """

    config_class = MarginMSEConfig

    def __init__(self, model=None, args=None, *positional, **kwargs):
        super().__init__(model, args, *positional, **kwargs)
        student = plain_model(self.model)
        for who, one in (("student", student), *(("teacher", plain_model(t)) for t in teachers_of(self.teacher))):
            if getattr(getattr(one, "config", None), "num_labels", 1) != 1 or self.task.kind != "sequence":
                raise ValueError(
                    f"MarginMSE compares one score for a query and a passage, but the {who} is a "
                    f"{type(one).__name__} with {one.config.num_labels} labels. Load it as a sequence classifier with "
                    "num_labels=1."
                )
        self._check_rows()
        longest = num_positions_of(student.config)
        if longest is not None and self.args.max_length > longest:
            raise ValueError(f"max_length is {self.args.max_length}, but the student reads {longest} tokens at most.")
        if kwargs.get("data_collator") is None:
            if self.processing_class is None:
                raise ValueError("MarginMSETrainer reads texts: give processing_class= the tokenizer of both models.")
            self.data_collator = CandidatesCollator(self.processing_class, self.args.max_length)
        theirs = getattr(plain_model(teachers_of(self.teacher)[0]), "config", None)
        for name in OF_SENTENCE_TRANSFORMERS:  # what its CrossEncoder makes of a score
            if hasattr(theirs, name) and not hasattr(student.config, name):
                setattr(student.config, name, getattr(theirs, name))

    def _check_rows(self) -> None:
        """Raise ValueError for columns that are not there, and for queries with different numbers of negatives."""
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is None:
            return
        if missing := [name for name in COLUMNS if name not in columns]:
            raise ValueError(f"MarginMSE needs the columns {list(COLUMNS)}, but {missing} are not among {columns}.")
        if len(sizes := {1 + len(negatives_of({"negative": one})) for one in self.train_dataset["negative"]}) > 1:
            raise ValueError(f"Each query needs as many negatives, but they have {sizes_text(sizes)}.")

    def prediction_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        size = int(inputs[CANDIDATES][0])
        loss = margin_loss(student.logits.view(-1, size), teacher.logits.view(-1, size))
        return {"margin_loss": Loss(size * loss, "prediction")}  # the sum is divided by the rows, size for each query

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]
