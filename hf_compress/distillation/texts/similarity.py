"""How much one sequence of tokens is like another: the sentence-level BLEU score."""

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4  # n-grams of 1 to so many tokens


def sentence_bleu(candidate: Sequence[int], reference: Sequence[int]) -> float:
    """BLEU of one sequence, 0 to 1: the geometric mean of n-gram precisions, times a penalty on brevity.

    Papineni et al., 2002, https://aclanthology.org/P02-1040; smoothed as in Lin and Och, 2004,
    https://aclanthology.org/P04-1077: one is added to matches and counts of n-grams above single tokens.
    """
    logs = []
    for n in range(1, ORDER + 1):
        mine, theirs = (
            Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)) for ids in (candidate, reference)
        )
        one = int(n > 1)
        matches = (mine & theirs).total() + one
        if matches == 0:
            return 0.0
        logs.append(math.log(matches / (mine.total() + one)))
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(brevity + sum(logs) / ORDER)


def closest(candidates: Sequence[list[int]], reference: Sequence[int]) -> list[int]:
    """The candidate most like the reference; of equals the first, the more probable of a beam."""
    return max(candidates, key=lambda candidate: sentence_bleu(candidate, reference))
