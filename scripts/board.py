"""The board: methods on subjects, all on equal terms, each cell a recipe that `hf-compress run` takes too.

    python scripts/board.py --data data/                     make what is missing, then the report
    python scripts/board.py --data data/ --only '*/gptq-*' --seeds 0 1 2
    python scripts/board.py --data data/ --only minilm-films/rtn-4 --remake
    python scripts/board.py --report                         docs/board.md and its page from what is there

`--data` is a folder with what the subjects (scripts/evidence/subjects) name as their data. A cell that is in the
records is kept; one that was cut off goes on from its last checkpoint. A new method is one file in
scripts/evidence/recipes.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from evidence.cells import SUBJECT, Cell, Rounds, make_apart, unpacked
from evidence.claims import claim_rows
from evidence.curves import page, picture
from evidence.methods import FOLDER as RECIPES
from evidence.methods import TEXTS, Method, find_methods
from evidence.results import Records, Row, difference, groups_of, rows_of
from evidence.subjects import FOLDER as SUBJECTS
from evidence.subjects import Subject, find_subjects
from evidence.table import BEGIN, END, HEADER, board, numbered_rows

from hf_compress.files.whole import write_whole
from hf_compress.recipe.options import RecipeError
from hf_compress.report.result import Interval

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        methods = find_methods(args.recipes, args.texts)
        if not args.report:
            subjects = find_subjects(args.data, args.output, args.subjects)
            make(args, list(planned(args, subjects, methods)))
        report(args, methods)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="Folder with the subjects' data.")
    parser.add_argument("--output", type=Path, default=Path("runs/board"), help="Subjects and unfinished cells.")
    parser.add_argument("--records", type=Path, default=DOCS / "board.jsonl", help="What was made, a line a cell.")
    parser.add_argument("--docs", type=Path, default=DOCS, help="Where board.md, board.html and its picture go.")
    parser.add_argument("--only", nargs="+", default=["*"], help="SUBJECT/METHOD, with * for any; made in this order.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--remake", action="store_true", help="Make again what is there, and say how far it agrees.")
    parser.add_argument("--report", action="store_true", help="Report on what is there, and make nothing.")
    parser.add_argument("--here", action="store_true", help="Make cells in this process: its memory is all of theirs.")
    parser.add_argument("--texts", type=int, default=TEXTS, help="Texts that a recipe may train on.")
    parser.add_argument("--rounds", type=int, nargs=2, default=[40, 3], help="Of latency and of throughput.")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="Folder of folders of methods.")
    parser.add_argument("--subjects", type=Path, default=SUBJECTS, help="Folder of subjects.")
    return parser.parse_args(words)


def planned(args: argparse.Namespace, subjects: dict[str, Subject], methods: dict[str, Method]) -> Iterator[Cell]:
    """The cells that are asked for: the subjects themselves, then seed by seed all methods."""
    named = {f"{subject}/{method}": (subjects[subject], methods[method]) for subject in subjects for method in methods}
    chosen = dict.fromkeys(name for pattern in args.only for name in named if fnmatch(name, pattern))
    if unknown := [pattern for pattern in args.only if not any(fnmatch(name, pattern) for name in named)]:
        raise RecipeError(
            f"--only {unknown[0]} names no cell. Subjects: {sorted(subjects)}; methods: {sorted(methods)}."
        )
    rounds = Rounds(*args.rounds)
    for subject in dict.fromkeys(named[name][0].name for name in chosen):
        yield Cell(subjects[subject], None, 0, args.output, rounds)
    for seed in args.seeds:
        for name in chosen:
            yield Cell(*named[name], seed, args.output, rounds)


def make(args: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Make each cell that has no record, and keep its record. One that fails is named, and the others are made."""
    failed = []
    for number, cell in enumerate(cells, 1):
        records = Records(args.records)
        before = records.of(cell.key) if cell.subject.is_made else None
        if before and not (args.remake and cell.method):
            continue
        print(f"{number}/{len(cells)} {cell.name}, seed {cell.seed}", flush=True)
        try:
            record = cell.make() if args.here else make_apart(cell)
        except (RecipeError, RuntimeError) as error:
            failed.append(str(error))
            print(f"    {error}", file=sys.stderr, flush=True)
            continue
        if before:
            record["before"] = compared(before, record)
        records.keep(record)
        cell.forget()
        print(f"    {record['quality']:.1%} in {record['seconds']:.0f} s", flush=True)
    if failed:
        raise RecipeError("\n".join([f"{len(failed)} of {len(cells)} cells failed:", *failed]))


def compared(before: dict, after: dict) -> dict:
    """What of an earlier record is kept beside the one that was made anew."""
    answers = [unpacked(record["answers"], record["examples"]) for record in (before, after)]
    differ = sum(a != b for a, b in zip(*answers, strict=True))
    return {"quality": before["quality"], "answers": before["answers"], "differ": differ, "latency": before["latency"]}


def report(args: argparse.Namespace, methods: dict[str, Method]) -> None:
    """Write the part of board.md between its marks, the page, and a picture for each subject."""
    records = list(Records(args.records).all.values())
    rows, sections = rows_of(records), []
    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    for name, own in groups_of(rows).items():
        place = f"images/board-{name}.png"
        write_whole(args.docs / place, picture(own, [_lost(row, own[0]) for row in own]))
        sections.append((name, place, [list(HEADER), *numbered_rows(own, methods)]))
    sections.append(("What papers claim", "", claim_rows(rows)))
    write_whole(args.docs / "board.html", page(sections))
    file = args.docs / "board.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# Board\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    write_whole(file, head + board(records, methods) + rest.partition(END)[2].lstrip("\n"))
    print(f"{len(records)} records, {file}")


def _lost(row: Row, subject: Row) -> Interval:
    return Interval(0.0, 0.0, 0.0) if row.method == SUBJECT else difference(subject, row)


if __name__ == "__main__":
    sys.exit(main())
