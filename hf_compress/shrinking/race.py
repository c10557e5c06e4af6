"""Which of a few structures that cost the same learns best: each learns for a tenth of the steps, from the same texts.

What a layer is worth is measured in the whole model, and does not tell what a thin one learns by itself; nor does one
depth serve all: a runtime in which a layer costs much even when it is thin wants few wide ones.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_compress.pruning.targets import StructureTimes
from hf_compress.recipe.recipe import Recipe
from hf_compress.report.score import is_share
from hf_compress.shrinking.times import THINNEST

logger = logging.getLogger(__name__)

DEPTHS = 3  # that are tried besides the choice by worth
SHARE, MOST, LEAST = 0.1, 150, 20  # of the steps of the training; at most so many; with fewer nothing can be told
TRIAL = "trial"
BY_WORTH = None  # heads, neurons and layers as they are worth over cost, in place of a number of layers


def depths(costs: StructureTimes, target: float, layers: int) -> list[int]:
    """So many of `layers` cost `target` when all of them are cut evenly: from whole ones to the thinnest, three at
    most. Empty where nothing has to be cut."""
    found = _possible(costs, target, layers)
    if len(found) <= DEPTHS:
        return list(found)
    return [found[round(i * (len(found) - 1) / (DEPTHS - 1))] for i in range(DEPTHS)]


def nearest_depth(depth: int | None, costs: StructureTimes, target: float, layers: int) -> int | None:
    """`depth`, or the nearest that costs `target` as well."""
    found = _possible(costs, target, layers)
    return min(found, key=lambda n: abs(n - depth)) if found and depth is not BY_WORTH else BY_WORTH


def _possible(costs: StructureTimes, target: float, layers: int) -> range:
    def has(number: int, share: float) -> bool:
        return costs.of(number, heads=share, neurons=share) <= target

    if has(layers, 1.0):
        return range(0)
    fewest = max([n for n in range(1, layers + 1) if has(n, 1.0)], default=1)
    return range(fewest, max([n for n in range(fewest, layers + 1) if has(n, THINNEST)], default=0) + 1)


def trial_steps(steps: int) -> int:
    """Of each structure, for a training of `steps`; 0 where that tells nothing."""
    few = min(int(SHARE * steps), MOST)
    return few if few >= LEAST else 0


def trial(written: Sequence[dict], steps: int) -> list[dict[str, Any]]:
    """The stages up to the student, which learns for so many steps."""
    found: list[dict[str, Any]] = []
    for stage in written:
        if "distil" in stage:
            few = {"name": TRIAL, "max_steps": steps, "logging_steps": max(1, steps // 2), "cache_teacher": False}
            return [*found, {"distil": {**stage["distil"], **few}}]
        found.append(stage)
    raise ValueError("No stage of these learns from a teacher.")


def winner(depths: Sequence[int], recipe: Callable[[int | None], Recipe], output: Path) -> int | None:
    """The number of layers, or BY_WORTH, whose student is the best after its steps.

    That is the one with the least loss over the last half of them, of those that do as well as any on the validation
    texts, or whose metric cannot be told apart from the best one's. The texts of these steps are new to it where the
    training has an epoch and more, and the same for all; but its teacher has learned them by heart, so that what kept
    most of it has little loss on them.
    """
    found: dict[int | None, dict[str, Any]] = {}
    for number in (BY_WORTH, *depths):
        try:
            made = recipe(number).run(output)
        except ValueError as error:
            if number is BY_WORTH:
                raise
            logger.warning("%s: left out: %s", _told(number), error)  # heads go whole: it may not come out so thin
            continue
        found[number] = made.stages[-1]["figures"]
        logger.warning("%s: loss %.4g", _told(number), _loss(found[number]))
    best = min(_as_good_as_any(found), key=lambda number: _loss(found[number]))
    logger.warning("best: %s", _told(best))
    return best


def _loss(figures: dict[str, Any]) -> float:
    return figures["last_losses"]["loss"]


def _as_good_as_any(found: dict[int | None, dict[str, Any]]) -> list[int | None]:
    """Those whose share of right answers on the validation texts lies within a standard error of the highest one."""
    told = {number: figures["validation"] for number, figures in found.items() if "validation" in figures}
    if not all(number in told and is_share(told[number]["metric"]) for number in found):
        return list(found)
    highest = max(told.values(), key=lambda one: one["value"])
    error = math.sqrt(highest["value"] * (1 - highest["value"]) / highest["texts"])
    return [number for number, one in told.items() if one["value"] >= highest["value"] - error]


def _told(number: int | None) -> str:
    if number is BY_WORTH:
        return "by worth over cost"
    return f"{number} layer{'s' * (number > 1)}, evenly"
