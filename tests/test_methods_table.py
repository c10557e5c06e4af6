"""docs/methods.md names what is there: each file, class, option and test of its table exists, and no row is empty."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
NAMED = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|md))(?:::([\w.]+))?`")
MADE = {json.loads(line)["method"] for line in (ROOT / "docs" / "board.jsonl").read_text(encoding="utf-8").splitlines()}
ABSENT = ("left out: ", "not built: ")


def table_rows(text):
    """The cells of each row of each table, without headers: method, survey, where, test, figure."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if row[0] != "method" and set(row[0]) != {"-"}]


def names_in(node):
    """What a module, a class or a function holds: names, and of a function or of `__init__` the arguments."""
    found = {}
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            found[child.name] = child
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            found |= {part.id: child for one in targets for part in ast.walk(one) if isinstance(part, ast.Name)}
    if isinstance(node, ast.FunctionDef):
        of = node.args
        found |= {one.arg: one for one in [*of.posonlyargs, *of.args, *of.kwonlyargs]}
    elif "__init__" in found:
        found = names_in(found["__init__"]) | found
    return found


def is_there(file, dotted=""):
    if not (ROOT / file).is_file():
        return False
    node = ast.parse((ROOT / file).read_text(encoding="utf-8")) if dotted else None
    return all((node := names_in(node).get(name)) is not None for name in filter(None, dotted.split(".")))


def faults(row):
    """What is wrong with a row, in words."""
    if len(row) != 5:
        return [f"{row[0]}: expected five cells, got {len(row)}"]
    method, survey, where, test, figure = row
    found = [f"{method}: no {file}{'::' * bool(name)}{name or ''}"
             for cell in (where, test) for file, name in NAMED.findall(cell) if not is_there(file, name)]  # fmt: skip
    if figure.startswith("board: "):
        found += [f"{method}: no {name} on the board" for name in re.findall(r"`(.+?)`", figure) if name not in MADE]
    if not survey:
        found.append(f"{method}: in which section?")
    if where.startswith(ABSENT):
        return found
    if not NAMED.search(where):
        found.append(f"{method}: where is it, or why is it left out?")
    tests = [file for file, _ in NAMED.findall(test)]
    if not tests or not all(file.startswith("tests/") for file in tests):
        found.append(f"{method}: which test holds it?")
    return found


ROWS = table_rows(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_row_names_exists(row):
    assert not faults(row)


def test_the_table_is_that_of_three_surveys():
    assert len(ROWS) > 60
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row, fault", [
    ("| a | 1 | left out: b | | board: `nowhere`, `rtn-8` |", "no nowhere on the board"),
    ("| a | 1 | `hf_compress/nowhere.py` | `tests/helpers.py` | |", "no hf_compress/nowhere.py"),
    ("| a | 1 | `hf_compress/quantization/quantize.py::quantize.gird` | `tests/helpers.py` | |", "quantize.gird"),
    ("| a | 1 | `hf_compress/pruning/methods/weights.py::WeightPruning.proximal` | `tests/helpers.py::test_no` | |",
     "no tests/helpers.py::test_no"),
    ("| a | 1 | somewhere | `tests/helpers.py` | |", "where is it"),
    ("| a | 1 | `hf_compress/version.py` | | |", "which test"),
    ("| a | | left out: a reason | | |", "in which section"),
    ("| a | 1 | left out: a reason | |", "five cells"),
])  # fmt: skip
def test_a_row_that_is_wrong_would_be_found(row, fault):
    assert fault in " ".join(faults(*table_rows(row)))


def test_options_of_functions_classes_and_dataclasses_are_found():
    assert is_there("hf_compress/quantization/quantize.py", "quantize.grid")
    assert is_there("hf_compress/pruning/methods/weights.py", "WeightPruning.proximal")
    assert is_there("hf_compress/distillation/methods/hints.py", "HintOptions.hints")
