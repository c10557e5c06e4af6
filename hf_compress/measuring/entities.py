"""Entities in a row of tags, and answers in a text, as the field's own scripts count them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PREFIX = re.compile(r"[BIES]-")


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether tags mark where entities begin and go on (B-PER, I-PER, O), in place of a class for each token."""
    return any(PREFIX.match(name) for name in names)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of the entities in a row of tags, as seqeval's default reads them (conlleval's rules).

    An entity begins at B or S, after O, E or S, and where the type changes; so a lone I begins one as well.
    """
    found, first = set(), 0
    before, type_before = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        another = type_before != kind
        if before in "ES" or (before in "BI" and mark in "BSO") or (before != "O" and another):
            found.add((type_before, first, place - 1))
        if mark in "BS" or (before in "OES" and mark in "IE") or (mark != "O" and another):
            first = place
        before, type_before = mark, kind
    return found


def plain_answer(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces: what SQuAD compares."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", kept).split())


def answer_scores(given: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words, each the best over `answers`; without any, no answer is the right one."""
    answers = [answer for answer in answers if plain_answer(answer)] or [""]
    exact = max(float(plain_answer(given) == plain_answer(answer)) for answer in answers)
    return exact, max(_overlap(plain_answer(given).split(), plain_answer(answer).split()) for answer in answers)


def _overlap(given: list[str], answer: list[str]) -> float:
    if not given or not answer:
        return float(given == answer)
    common = sum((Counter(given) & Counter(answer)).values())
    return 2 * common / (len(given) + len(answer))
