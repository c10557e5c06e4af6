"""ROUGE of what a model writes: the words, pairs of words and the longest common sequence that it shares with a target.

Lin, 2004, https://aclanthology.org/W04-1013. Words are runs of letters and digits in lower case, as the package
rouge_score cuts them without stemming; each figure is the F1 of precision and recall, the mean over the examples.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.measuring.metrics import MeanOf, Metric, f1

WORD = re.compile(r"[a-z0-9]+")


def rouge_scores(given: str, target: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of one text against another; 0 where one of them has no words."""
    mine, theirs = (WORD.findall(text.lower()) for text in (given, target))
    scores = []
    for size in (1, 2):
        grams = [Counter(zip(*(words[i:] for i in range(size)), strict=False)) for words in (mine, theirs)]
        scores.append((sum((grams[0] & grams[1]).values()), *(sum(counted.values()) for counted in grams)))
    scores.append((_common(mine, theirs), len(mine), len(theirs)))
    return tuple(f1(*map(torch.tensor, counted)).item() for counted in scores)


def _common(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """The length of the longest sequence of words that stands in both, in this order."""
    lengths = [0] * (len(theirs) + 1)
    for word in mine:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            diagonal, lengths[place] = (
                lengths[place],
                (diagonal + 1 if word == other else max(lengths[place], lengths[place - 1])),
            )
    return lengths[-1]


def rouge(tokenizer: PreTrainedTokenizerBase, *, most_tokens: int = 64) -> Metric:
    """ROUGE-L, and ROUGE-1 and ROUGE-2 beside it, of what a sequence-to-sequence model writes, greedily.

    Rows hold the text that should be written as `target`. Writing takes as many forwards as there are tokens.
    """
    return Metric(
        "ROUGE-L", partial(_keep, tokenizer), MeanOf(2), {"ROUGE-1": MeanOf(0), "ROUGE-2": MeanOf(1)}, ("target",),
        run=partial(_write, most_tokens),
    )  # fmt: skip


def _write(most_tokens: int, model: PreTrainedModel, arguments: Mapping[str, Tensor]) -> Tensor:
    read = {name: value for name, value in arguments.items() if not name.startswith("decoder_")}
    return model.generate(**read, max_new_tokens=most_tokens, do_sample=False, num_beams=1)


def _keep(
    tokenizer: PreTrainedTokenizerBase, outputs: Tensor, batch: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]]
) -> Tensor:
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return torch.tensor([rouge_scores(text, row["target"]) for text, row in zip(texts, rows, strict=True)])
