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
ALMOST = 0.999  # all runs in common, but not the same words: a longer text holds the held-out one
SHOWN = 5  # pairs that are printed


@dataclass(frozen=True)
class Match:
    """A held-out text and a text of the train split that is like it, by their numbers."""

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
    """Every held-out text with every text of `train` that is the same, or has such a share of its runs of words."""
    if length < 1 or not 0 < share <= 1:
        raise ValueError(f"length must be at least 1 and share within (0, 1], got {length} and {share}.")
    known = [words_of(text) for text in train]
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, words in enumerate(known):
        for run in runs_of(words, length) if words else ():
            places[run].append(number)
    found = []
    for number, words in enumerate(map(words_of, held_out)):
        runs = runs_of(words, length)
        counts = Counter(place for run in runs for place in places.get(run, ()))
        for place, common in sorted(counts.items()):
            if words == known[place]:
                found.append(Match(number, place, 1.0))
            elif common >= share * len(runs):
                found.append(Match(number, place, min(common / len(runs), ALMOST)))
    return found


def counted(matches: Sequence[Match]) -> tuple[int, int]:
    """How many held-out texts stand in the train split, and how many others nearly do."""
    same = {match.held_out for match in matches if match.is_same}
    return len(same), len({match.held_out for match in matches} - same)


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
        same, nearly = counted(found)
        print(f"{name}: of {len(texts[name]):,} texts {same} stand in the train split, {nearly} nearly do")
        for match in found[:SHOWN]:
            print(f"  {match.share:4.0%}  {texts[name][match.held_out][:90]!r}")
            print(f"        {texts['train'][match.train][:90]!r}")
        any_found |= bool(found)
    return int(any_found)


if __name__ == "__main__":
    sys.exit(main())
