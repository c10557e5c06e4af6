"""What has been made: a file of records, one line a cell, and what the seeds of a method come to."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from evidence.cells import SUBJECT, unpacked
from torch import Tensor

from hf_compress.files.whole import write_whole
from hf_compress.recipe.options import RecipeError
from hf_compress.report.result import Interval
from hf_compress.report.score import score_over_size

DRAWS = 4000
KEY = ("subject", "method", "seed")


class Records:
    """The records in a file of JSON lines: one for each subject, method and seed, the last one made.

    A machine remakes a subject with other last bits than the next one, so a subject has a record for each model that
    something began with, and a cell is known by its `fingerprint` to have begun with one of them.
    """

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.all = {_key(record): record for record in map(json.loads, lines)}

    def of(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a cell; None where it was not made, or by another recipe or from another subject."""
        record = self.all.get(_key(key))
        if record is None or record["method"] == SUBJECT:
            return record
        base = self.all.get(_key({**key, "method": SUBJECT, "seed": 0, "fingerprint": record["fingerprint"]}))
        own = self.all.get(_key({**key, "method": SUBJECT, "seed": 0}))
        is_known = base is not None and own is not None and terms_of(base) == terms_of(own)
        return record if is_known and record["recipe"] == key["recipe"] else None

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write the file anew, whole, with this record in its place."""
        self.all[_key(record)] = dict(record)
        lines = [json.dumps(one, sort_keys=True) for one in sorted(self.all.values(), key=_key)]
        write_whole(self.file, "\n".join([*lines, ""]))


def _key(record: Mapping[str, Any]) -> tuple:
    return *(record[name] for name in KEY), record["fingerprint"] if record["method"] == SUBJECT else ""


def terms_of(base: Mapping[str, Any]) -> tuple[str, str]:
    """What makes two models one subject, made on two machines: its recipe and the texts that it is tested on."""
    return base["recipe"], base["test_texts"]


def machine_of(record: Mapping[str, Any]) -> str:
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    return f"{record['device']}, {threads}, torch {record['versions']['torch']}"


@dataclass(frozen=True)
class Row:
    """All seeds of a method on a subject, whatever machine made them.

    `bases` are the records of the subject's models that they began with, one for each of `records`.
    """

    subject: str
    method: str
    kind: str
    records: tuple[Mapping[str, Any], ...]
    bases: tuple[Mapping[str, Any], ...]

    @property
    def machines(self) -> list[str]:
        """What made them, the one that made most of them first: speeds are its own."""
        return [machine for machine, _ in Counter(map(machine_of, self.records)).most_common()]

    @property
    def relative(self) -> Tensor:
        """(seeds, texts), 1 where right, less the same of the model that each began with."""
        return _answers(self.records) - _answers(self.bases)

    @property
    def began(self) -> list[tuple[int, str]]:
        """Seed and model of each record."""
        return [(record["seed"], record["fingerprint"]) for record in self.records]

    @property
    def quality(self) -> float:
        return statistics.fmean(record["quality"] for record in self.records)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one."""
        found = [record["quality"] for record in self.records]
        return statistics.stdev(found) if len(found) > 1 else None

    @property
    def seeds(self) -> list[int]:
        return [record["seed"] for record in self.records]

    @property
    def score_over_size(self) -> float:
        return score_over_size([100 * self.quality], self.mean("parameters"))

    def mean(self, name: str) -> float:
        return statistics.fmean(record[name] for record in self.records)

    def speed(self, name: str) -> Interval:
        """The median over seeds of a ratio on one machine, and the widest of their intervals' ends."""
        alike = (record[name] for record in self.records if machine_of(record) == self.machines[0])
        values, lows, highs = zip(*alike, strict=True)
        return Interval(statistics.median(values), min(lows), max(highs))


def _answers(records: Iterable[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([unpacked(record["answers"], record["examples"]) for record in records], dtype=torch.double)


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each method and subject; the subject first, then by kind and quality.

    Raises RecipeError where the record of a model that a cell began with is not there.
    """
    records = sorted(records, key=_key)
    bases = {(one["subject"], one["fingerprint"]): one for one in records if one["method"] == SUBJECT}
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        base = bases.get((record["subject"], record["fingerprint"]))
        if base is None:
            raise RecipeError(f"The records hold cells of {record['subject']}, but not the model that they began with.")
        groups.setdefault((record["subject"], terms_of(base), record["method"]), []).append(record)
    rows = []
    for (subject, _, method), found in groups.items():
        began = tuple(bases[subject, one["fingerprint"]] for one in found)
        rows.append(Row(subject, method, found[0]["kind"], tuple(found), began))
    return sorted(rows, key=lambda row: (row.subject, row.kind, -row.quality, row.method))


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """name -> the rows of one subject, its own first; one of that name but of other terms is called SUBJECT-2."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.subject, terms_of(row.bases[0])), []).append(row)
    named: dict[str, list[Row]] = {}
    for (subject, _), own in groups.items():
        number = 1 + sum(found[0].subject == subject for found in named.values())
        named[subject if number == 1 else f"{subject}-{number}"] = own
    return named


def difference(reference: Row, candidate: Row, *, draws: int = DRAWS) -> Interval:
    """Of quality, candidate less reference, each less the model that it began with, with its 95% interval.

    Both the texts and the seeds are drawn again. Seeds that began with the same model are paired, where all of one row
    are so in the other; else each row's are drawn by themselves. With one seed each the interval is of the texts alone.
    """
    mine, theirs = candidate.began, reference.began
    shared = [pair for pair in mine if pair in theirs]
    if len(shared) == min(len(mine), len(theirs)) and len(theirs) > 1:
        candidates, references = (
            row.relative[[row.began.index(pair) for pair in shared]] for row in (candidate, reference)
        )
        return crossed_interval(candidates - references, draws=draws)
    return crossed_interval(candidate.relative, reference.relative, draws=draws)


def crossed_interval(values: Tensor, less: Tensor | None = None, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of values (seeds, texts), and its percentile interval when rows and columns are drawn again.

    less  (other seeds, the same texts), whose mean is taken off, with its rows drawn by themselves
    """
    n = values.shape[1]
    of_texts = _counts(n, draws, seed)
    means = _counts(len(values), draws, seed + 1) @ values / len(values)  # (draws, texts)
    if less is not None:
        means = means - _counts(len(less), draws, seed + 2) @ less / len(less)
    drawn = (means * of_texts).sum(1) / n
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    value = values.mean() - (0 if less is None else less.mean())
    return Interval(value.item(), low, high)


@lru_cache(maxsize=8)  # 48 MB for 1,500 texts, and the same for every pair of rows
def _counts(size: int, draws: int, seed: int) -> Tensor:
    """How often each of `size` seeds or texts is drawn, (draws, size)."""
    chosen = torch.randint(size, (draws, size), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(draws, size, dtype=torch.double)
    return torch.zeros(draws, size, dtype=torch.double).scatter_add_(1, chosen, ones)
