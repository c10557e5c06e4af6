"""The board as text: every row with its intervals, its costs and the machine that made it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evidence.cells import SUBJECT
from evidence.claims import claim_rows
from evidence.methods import TEXTS, Method
from evidence.results import Row, difference, groups_of, rows_of

from hf_compress.report.result import Interval
from hf_compress.report.tables import size_text

HEADER = ("", "method", "accuracy", "less the subject's", "on disk", "bits", "latency", "batch of 32", "score / size",
          "seeds", "made in", "memory", "on")  # fmt: skip
BEGIN, END = "<!-- made by scripts/board.py -->", "<!-- end of what scripts/board.py makes -->"


def board(records: Sequence[Mapping[str, Any]], methods: Mapping[str, Method]) -> str:
    """Markdown of everything that was made."""
    rows = rows_of(records)
    parts = [BEGIN, _coverage(rows, methods)]
    for name, own in groups_of(rows).items():
        parts += [f"### {name}", _conditions(own), _overlap_sentence(own[0].records[0]["overlap"]),
                  f"![Accuracy against size and latency, numbered as below](images/board-{name}.png)",
                  markdown([list(HEADER), *numbered_rows(own, methods)])]  # fmt: skip
    parts += ["### What papers claim", markdown(claim_rows(rows)), *_remade(records), END]
    return "\n\n".join(part for part in parts if part) + "\n"


def _coverage(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    made = [row for row in rows if row.method != SUBJECT]
    cells = sum(len(row.records) for row in made)
    subjects = len({row.subject for row in made})
    by_seed = {seed: sum(seed in row.seeds for row in made) for seed in sorted({s for row in made for s in row.seeds})}
    told = ", ".join(f"seed {seed}: {number}" for seed, number in by_seed.items()) or "none"
    missing = sorted(set(methods) - {row.method for row in made})
    return (
        f"{cells} cells of {len(methods)} methods on {subjects} subject{'s' * (subjects != 1)} ({told} of "
        f"{len(methods)} methods). Each recipe trains on {TEXTS:,} texts at most, repetitions counted, or on none."
        + (f" Not made yet: {', '.join(missing)}." if missing else "")
    )


def _conditions(rows: Sequence[Row]) -> str:
    one = rows[0].records[0]
    machines = " ".join(f"{letter}: {machine}." for machine, letter in _letters(rows).items())
    others = ", ".join(f"{name} {number}" for name, number in one["versions"].items() if name != "torch")
    return f"{one['examples']:,} test texts; speed on {one['length']} tokens. Made and measured on {machines} {others}."


def _letters(rows: Sequence[Row]) -> dict[str, str]:
    """Machine -> the letter that marks its rows."""
    machines = dict.fromkeys(machine for row in rows for machine in row.machines)
    return {machine: chr(ord("A") + i) for i, machine in enumerate(machines)}


def _overlap_sentence(facts: Mapping[str, Any]) -> str:
    told = [f"of {facts[name]['texts']:,} {name} texts {facts[name]['same']} stood in the train split and "
            f"{facts[name]['nearly']} nearly did" for name in ("test", "validation")]  # fmt: skip
    return f"Overlap: {'; '.join(told)}; {facts['taken_out']} of {facts['train']:,} train texts were taken out for it."


def numbered_rows(rows: Sequence[Row], methods: Mapping[str, Method]) -> list[list[str]]:
    """The table of one subject, whose own row is the first, with the numbers of the picture."""
    letters = _letters(rows)
    made_on = [", ".join(letters[machine] for machine in row.machines) for row in rows]
    return [[str(i), *_cells(row, rows[0], methods), made_on[i]] for i, row in enumerate(rows)]


def _cells(row: Row, subject: Row, methods: Mapping[str, Method]) -> list[str]:
    spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
    rate = subject.mean("stored_bytes") / row.mean("stored_bytes")
    stale = row.method in methods and any(record["recipe"] != methods[row.method].digest for record in row.records)
    zeros = f", {row.mean('zeros'):.0%} zeros" if row.mean("zeros") > 0.01 else ""
    memory = [record["peak_memory_bytes"] for record in row.records if record["peak_memory_bytes"]]
    return [
        f"{row.kind}/{row.method}".removeprefix("/") + " (an earlier recipe)" * stale,
        f"{100 * row.quality:.1f}%{spread}",
        points(difference(subject, row)) if row.kind else "",
        f"{size_text(row.mean('stored_bytes'))} ({rate:.1f}x)",
        f"{row.mean('bits_per_weight'):.1f}{zeros}",
        times(row.speed("latency")) if row.kind else f"{row.records[0]['latency_ms']:.1f} ms",
        times(row.speed("throughput")) if row.kind else "",
        f"{row.score_over_size:.2f}",
        ", ".join(map(str, row.seeds)) if row.kind else "",
        f"{statistics.fmean(record['seconds'] for record in row.records):.0f} s",
        size_text(max(memory)) if memory else "-",
    ]


def points(interval: Interval) -> str:
    return f"{100 * interval.value:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def times(interval: Interval) -> str:
    return f"{interval.value:.2f}x ({interval.low:.2f} to {interval.high:.2f})"


def _remade(records: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        if before := record.get("before"):
            speeds = [times(Interval(*one["latency"])) for one in (before, record)]
            lines.append(
                f"- {record['subject']}/{record['method']}, seed {record['seed']}: {100 * before['quality']:.1f}%, "
                f"then {100 * record['quality']:.1f}%, {before['differ']} of {record['examples']:,} answers differ; "
                f"latency {speeds[0]}, then {speeds[1]}"
            )
    return ["### Remade", "\n".join(lines)] if lines else []


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
