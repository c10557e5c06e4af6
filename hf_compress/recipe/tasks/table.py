"""The tasks by name, and which one it is: told by a model's class, or where that is open by the data's columns."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_compress.recipe.columns import find_label_column
from hf_compress.recipe.tasks.answering import COLUMNS as ANSWERING
from hf_compress.recipe.tasks.answering import QuestionAnswering
from hf_compress.recipe.tasks.choosing import LISTS, NUMBERED, MultipleChoice
from hf_compress.recipe.tasks.classification import (
    SCORE,
    Classification,
    Regression,
    SeveralLabels,
    problem,
    told_by_values,
)
from hf_compress.recipe.tasks.embedding import Embeddings
from hf_compress.recipe.tasks.language import CausalLM, MaskedLM, Seq2Seq
from hf_compress.recipe.tasks.tagging import TAGS, WORDS, Tagging
from hf_compress.recipe.tasks.task import Task
from hf_compress.recipe.texts import open_splits

KINDS = (
    Classification,
    SeveralLabels,
    Regression,
    Tagging,
    QuestionAnswering,
    MultipleChoice,
    MaskedLM,
    CausalLM,
    Seq2Seq,
    Embeddings,  # last: the classes of its models end as others do
)
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in KINDS}


def task_of(model: str | Path, options: Any = None) -> str:
    """What a model is for, by the class that its config names; where it is one to begin with, what the data are for."""
    config = AutoConfig.from_pretrained(model)
    name = next(iter(config.architectures or []), "")
    kind = next((kind for kind in KINDS if name.endswith(kind.endings)), None)
    if kind is Classification:
        kinds = {"regression": Regression, "multi_label_classification": SeveralLabels}
        return kinds.get(problem(config), Classification).name
    if kind not in (None, MaskedLM, Embeddings):
        return kind.name
    told = task_of_data(options) if options is not None and options.source else None
    return told or (kind or Classification).name


def task_of_data(options: Any) -> str | None:
    """The task that columns are usually for; None for texts alone."""
    splits, _ = open_splits(options.source)
    columns = splits["train"].column_names
    known = {column.strip().lower() for column in columns}
    if known & set(WORDS) and known & set(TAGS):
        return Tagging.name
    if all(known & set(names) for names in ANSWERING.values()):
        return QuestionAnswering.name
    if options.choices_column or known & set(LISTS) or any(NUMBERED.fullmatch(name) for name in known):
        return MultipleChoice.name
    if options.label_column and "," in options.label_column:
        return SeveralLabels.name
    label = find_label_column(options.label_column, columns, options.source)
    if label is None and (scores := [column for column in columns if column.strip().lower() == SCORE]):
        told = told_by_values(splits["train"], scores[0]).name
        return told if told == Regression.name else None
    return None if label is None else told_by_values(splits["train"], label).name
