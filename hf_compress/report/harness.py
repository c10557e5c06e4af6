"""Tasks of the language model evaluation harness (lm-eval), through its Python interface, where it is installed."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def has_harness() -> bool:
    return "lm_eval" in sys.modules or find_spec("lm_eval") is not None


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """task -> metric -> value of a language model, standard errors included.

    `limit` uses only so many examples of each task. Raises ImportError where lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("tasks of lm-eval need it installed: pip install lm_eval") from error
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
    return {
        task: {name.partition(",")[0]: value for name, value in scores.items() if isinstance(value, (int, float))}
        for task, scores in results.items()
    }
