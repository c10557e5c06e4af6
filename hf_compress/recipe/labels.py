"""Labels as users write them, and the numbers that a model gives them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PretrainedConfig

WHOLE = re.compile(r"[-+]?\d+(\.0*)?")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
COMMA = re.compile(r"[-+]?\d[\d.']*,\d+")  # 0,5 and 1.234,5
LIST = re.compile(r"[\[{(].*[\])}]", re.DOTALL)  # as CSV keeps a list of Python or JSON
TRUTH = ("false", "true")  # what are 0 and 1 to everyone else


def written(label: Any) -> str | None:
    """A label as its name, without white space at its ends; None where there is none."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    return str(label).strip() or None


def are_whole(labels: Iterable[str]) -> bool:
    return all(WHOLE.fullmatch(label) for label in labels)


def have_commas(labels: Iterable[str]) -> bool:
    """Whether all are numbers, and some of them written with a decimal comma."""
    labels = list(labels)
    are_numbers = all(NUMBER.fullmatch(label) or COMMA.fullmatch(label) for label in labels)
    return are_numbers and any(COMMA.fullmatch(label) for label in labels)


def without_point(label: str) -> str:
    """`1.0` as `1`: a column of whole numbers turns into such where one is missing."""
    return label.partition(".")[0]


def in_order(names: Iterable[str], source: str) -> tuple[list[str], bool]:
    """The names of classes in the order of their numbers, and whether this order is one that others share.

    Whole numbers stand in numeric order, false before true; other names by the alphabet, which is ours alone.

    Raises ValueError for fractions, which are no classes.
    """
    names = set(names)
    if names and all(LIST.fullmatch(name) for name in names):
        raise ValueError(
            f"The labels of {source} are lists written as texts, such as {min(names)}. Give them as JSON lines "
            "or parquet, or in a column of 0 and 1 for each label, named with commas as label_column."
        )
    if have_commas(names):
        raise ValueError(
            f"The labels of {source} are numbers with a decimal comma, such as {sorted(names)[:5]}, and no classes. "
            "Write numbers to predict with a point, and give classes other names."
        )
    if are_whole(names):
        return sorted(names, key=lambda name: (int(without_point(name)), name)), True
    if all(NUMBER.fullmatch(name) for name in names):
        shown = sorted(names, key=float)[:5]
        raise ValueError(
            f"The labels of {source} are fractions, such as {shown}: numbers to predict, not classes. Name the "
            "column of the classes with label_column, or choose the task regression."
        )
    if {name.lower() for name in names} == set(TRUTH) and len(names) == len(TRUTH):
        return sorted(names, key=str.lower), True
    return sorted(names), False


def numbers_in(config: PretrainedConfig, names: Sequence[str], *, shared_order: bool) -> list[int] | None:
    """The number that a model gives each of `names`; None when its config does not tell.

    The model's own names decide, also where it knows more. A model whose labels have no names (LABEL_0, ...) takes
    whole numbers as they are, and other names only where their order is one that others share.
    """
    known = {str(name).strip(): int(number) for number, name in config.id2label.items()}
    if all(name in known for name in names):
        return [known[name] for name in names]
    unnamed = all(name.startswith("LABEL_") for name in known)
    if are_whole(names):
        numbers, size = [int(name) for name in names], config.num_labels
        fits = all(0 <= number < size for number in numbers)
        complete = sorted(numbers) == list(range(size)) and not any(WHOLE.fullmatch(name) for name in known)
        return numbers if fits and (unnamed or complete) else None
    return list(range(len(names))) if unnamed and shared_order and len(names) == config.num_labels else None
