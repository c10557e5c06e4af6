"""Answers that a model marks in a text: the span of the highest start and end, as SQuAD's scripts choose it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CANDIDATES = 20  # starts, and ends, that are tried with one another
LONGEST_ANSWER = 30  # tokens


def best_answers(
    outputs: Any, batch: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], *, may_be_none: bool
) -> list[str]:
    """The text that each row's question is answered with, of its `context`.

    `offset_mapping` of a row says where each of its tokens stands in the context, None for those outside of it. An
    answer that `may_be_none` is the empty text where the first token is likelier than all answers, as in SQuAD 2.
    """
    starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
    first = batch.get("attention_mask", torch.ones_like(starts)).argmax(-1).tolist()  # later, with padding on the left
    found = []
    for i, row in enumerate(rows):
        begin, places = first[i], row["offset_mapping"]
        start, end = (logits[i, begin : begin + len(places)] for logits in (starts, ends))
        found.append(_best(start, end, places, row["context"], may_be_none))
    return found


def true_answers(row: Mapping[str, Any]) -> Sequence[str]:
    """The answers of a row, as a list or as SQuAD keeps them; none where the question has none."""
    answers = row["answers"]
    return answers["text"] if isinstance(answers, Mapping) else answers


def _best(start: Tensor, end: Tensor, places: Sequence, context: str, may_be_none: bool) -> str:
    best, text = (start[0] + end[0]).item() if may_be_none else float("-inf"), ""
    for s in start.topk(min(CANDIDATES, len(start))).indices.tolist():
        for e in end.topk(min(CANDIDATES, len(end))).indices.tolist():
            if places[s] is None or places[e] is None or not s <= e < s + LONGEST_ANSWER:
                continue
            score = (start[s] + end[e]).item()
            if score > best:
                best, text = score, context[places[s][0] : places[e][1]]
    return text
