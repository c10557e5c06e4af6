"""The score of a model over several tasks, and that over its size, by which a survey ranks methods."""

import math
import statistics
from collections.abc import Mapping, Sequence

TASK_SCORES = (
    "acc",
    "f1",
    "exact_match",
    "mcc",
)  # of tasks of lm-eval; the first that is there


def is_share(metric: str) -> bool:
    """Whether a metric is a share of what could be right, and so told in percent."""
    return metric.endswith(("accuracy", "F1"))


def task_scores(tasks: Mapping[str, Mapping[str, float]]) -> list[float]:
    """One score in points for each task of lm-eval (task -> metric -> value) that has one."""
    found = (next((scores[name] for name in TASK_SCORES if name in scores), None) for scores in tasks.values())
    return [100 * score for score in found if score is not None]


def score_over_size(scores: Sequence[float], parameters: float) -> float:
    """The mean score over tasks, in points, divided by millions of parameters.

    Gupta and Agrawal, 2020, section 8.1, of GLUE: the tasks for which there are scores. It favours the small: half the
    parameters outweigh half the points. Bits do not count. Raises ValueError without a score, for one that is not
    finite, and for a model without parameters.
    """
    if not scores or not all(map(math.isfinite, scores)):
        raise ValueError(f"score_over_size needs one finite score or more, got {list(scores)}.")
    if parameters <= 0:
        raise ValueError(f"score_over_size divides by the number of parameters, got {parameters}.")
    return statistics.fmean(scores) / (parameters / 1e6)
