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
    """The records in a file of JSON lines: one for each subject, method and seed, the last one made."""

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.all = {_key(record): record for record in map(json.loads, lines)}

    def of(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a cell; None where it was not made, or by another recipe or from another model."""
        record = self.all.get(_key(key))
        return record if record and all(record[name] == value for name, value in key.items()) else None

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write the file anew, whole, with this record in its place."""
        self.all[_key(record)] = dict(record)
        lines = [json.dumps(one, sort_keys=True) for one in sorted(self.all.values(), key=_key)]
        write_whole(self.file, "\n".join([*lines, ""]))


def _key(record: Mapping[str, Any]) -> tuple:
    return tuple(record[name] for name in KEY)


def machine_of(record: Mapping[str, Any]) -> str:
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    return f"{record['device']}, {threads}, torch {record['versions']['torch']}"


@dataclass(frozen=True)
class Row:
    """All seeds of a method on a subject that began with the same model, whatever machine made them."""

    subject: str
    method: str
    kind: str
    records: tuple[Mapping[str, Any], ...]

    @property
    def began(self) -> str:
        """Fingerprint of the model that it began with."""
        return self.records[0]["fingerprint"]

    @property
    def machines(self) -> list[str]:
        """What made them, the one that made most of them first: speeds are its own."""
        return [machine for machine, _ in Counter(map(machine_of, self.records)).most_common()]

    @property
    def answers(self) -> Tensor:
        """(seeds, texts), 1 where right."""
        rows = [unpacked(record["answers"], record["examples"]) for record in self.records]
        return torch.tensor(rows, dtype=torch.double)

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


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each method and model that it began with; the subject first, then by kind and quality."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=_key):
        key = record["subject"], record["method"], record["fingerprint"]
        groups.setdefault(key, []).append(record)
    rows = [Row(key[0], key[1], found[0]["kind"], tuple(found)) for key, found in groups.items()]
    return sorted(rows, key=lambda row: (row.subject, row.kind, -row.quality, row.method))


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """name -> the rows that began with one model, its own first; a subject's second model is called SUBJECT-2.

    Raises RecipeError where the row of the model itself is not there.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.subject, row.began), []).append(row)
    named: dict[str, list[Row]] = {}
    for (subject, _), own in groups.items():
        if own[0].method != SUBJECT:
            raise RecipeError(f"The records hold cells of {subject}, but not the model that they began with.")
        number = 1 + sum(found[0].subject == subject for found in named.values())
        named[subject if number == 1 else f"{subject}-{number}"] = own
    return named


def difference(reference: Row, candidate: Row, *, draws: int = DRAWS) -> Interval:
    """Of quality, candidate less reference, with its 95% interval: both the texts and the seeds are drawn again.

    Seeds that both have are paired, else each is held against the mean of the reference. With one seed the interval is
    of the texts alone.
    """
    shared = sorted(set(reference.seeds) & set(candidate.seeds))
    if shared and len(reference.seeds) > 1:
        mine, theirs = (row.answers[[row.seeds.index(seed) for seed in shared]] for row in (candidate, reference))
    else:
        mine, theirs = candidate.answers, reference.answers.mean(0, keepdim=True)
    return crossed_interval(mine - theirs, draws=draws)


def crossed_interval(values: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of values (seeds, texts), and its percentile interval when rows and columns are drawn again."""
    S, n = values.shape
    of_seeds, of_texts = _counts(S, n, draws, seed)
    drawn = ((of_seeds @ values) * of_texts).sum(1) / (S * n)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(values.mean().item(), low, high)


@lru_cache(maxsize=3)  # 48 MB for 1,500 texts, and the same for every pair of rows
def _counts(S: int, n: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """How often each of S seeds and of n texts is drawn, (draws, S) and (draws, n)."""
    generator = torch.Generator().manual_seed(seed)

    def counts(size: int) -> Tensor:
        chosen = torch.randint(size, (draws, size), generator=generator)
        ones = torch.ones(draws, size, dtype=torch.double)
        return torch.zeros(draws, size, dtype=torch.double).scatter_add_(1, chosen, ones)

    return counts(S), counts(n)
