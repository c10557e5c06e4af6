"""Do texts that a model is measured on also stand among those it learns from?

    python scripts/checks/overlap.py movie_reviews/

Two texts are the same if their words are, whatever the case, accents' form, spaces and punctuation; they are nearly
the same if at least half of the held-out text's runs of five words stand in one text of the train split. Texts of fewer
words are compared whole. Exit code 1 where any are found.
"""

import argparse
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hf_compress.recipe.texts import load_texts, text_columns

WORDS, SHARE = 5, 0.5
SHOWN = 5  # pairs that are printed


@dataclass(frozen=True)
class Match:
    """A held-out text and the text of the train split that is most like it, by their numbers."""

    held_out: int
    train: int
    share: float  # of the held-out text's runs of words that stand in the other; 1 for the same words

    @property
    def is_same(self) -> bool:
        return self.share == 1.0


def words_of(text: str) -> list[str]:
    """The words of a text, so that texts that differ in case and punctuation alone have the same ones."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def runs_of(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """Every run of `length` words; of a shorter text all of it, marked as whole."""
    if len(words) < length:
        return {("", *words)}
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def overlaps(
    train: Sequence[str], held_out: Sequence[str], *, length: int = WORDS, share: float = SHARE
) -> list[Match]:
    """For each held-out text that has one, the most similar text of `train`, at least `share` of its runs in common."""
    if length < 1 or not 0 < share <= 1:
        raise ValueError(f"length must be at least 1 and share within (0, 1], got {length} and {share}.")
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    whole: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(train):
        words = words_of(text)
        whole.setdefault(tuple(words), number)
        for run in runs_of(words, length):
            places[run].append(number)
    found = []
    for number, text in enumerate(held_out):
        words = words_of(text)
        if words and (same := whole.get(tuple(words))) is not None:
            found.append(Match(number, same, 1.0))
            continue
        runs = runs_of(words, length)
        counts = Counter(place for run in runs for place in places.get(run, ()))
        best, common = max(counts.items(), key=lambda one: (one[1], -one[0]), default=(0, 0))
        if common >= share * len(runs):
            found.append(Match(number, best, min(common / len(runs), 0.999)))  # 1 is for the same words alone
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="A file, a folder with splits or a Hub name, as recipes take them.")
    parser.add_argument("--words", type=int, default=WORDS, help="Words in a run.")
    parser.add_argument("--share", type=float, default=SHARE, help="Share of runs in common that makes a match.")
    args = parser.parse_args()
    splits = load_texts(args.data)
    texts = {name: [" ".join(row[c] for c in text_columns(split)) for row in split] for name, split in splits.items()}
    any_found = False
    for name in ("validation", "test"):
        found = overlaps(texts["train"], texts[name], length=args.words, share=args.share)
        same = sum(match.is_same for match in found)
        print(f"{name}: of {len(texts[name]):,} texts {same} stand in the train split, {len(found) - same} nearly do")
        for match in found[:SHOWN]:
            print(f"  {match.share:4.0%}  {texts[name][match.held_out][:90]!r}")
            print(f"        {texts['train'][match.train][:90]!r}")
        any_found |= bool(found)
    return int(any_found)


if __name__ == "__main__":
    sys.exit(main())
