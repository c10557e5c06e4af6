"""Transformers' own tests of `Trainer`, with ours in its place.

    python scripts/checks/trainer_suite.py TESTS [--trainer NAME ...] [--files PATTERN ...] [--timeout SECONDS]

TESTS is the folder `tests` of Transformers' repository at the version that is installed (its `tests/trainer`, and what
these import from beside it); it is no part of this project. Each file runs in a process of its own, once with the stock
Trainer and once with each of ours in the place of `transformers.Trainer`. Told is, for each, how many of the tests that
the stock Trainer passes pass, which fail, and which do not apply: those that a trainer refuses by a sentence before
training, and those that are skipped on this machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

STOCK = "Trainer"
OURS = ("DistillationTrainer", "HeadPruningTrainer", "WeightPruningTrainer", "BlockPruningTrainer", "QBertTrainer")
FILES = ("test_trainer.py", "test_trainer_callback.py", "test_trainer_checkpointing.py", "test_trainer_data.py",
         "test_trainer_evaluation.py", "test_trainer_hyperparameter.py", "test_trainer_optimizers.py")  # fmt: skip
Outcomes = dict[str, str]  # test -> passed, failed, refused or skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", type=Path, help="The folder `tests` of Transformers' repository.")
    parser.add_argument("--trainer", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--files", nargs="+", default=list(FILES), help="Patterns of files in tests/trainer.")
    parser.add_argument("--timeout", type=int, default=600, help="Seconds that a file may take.")
    options = parser.parse_args()
    files = sorted({file for pattern in options.files for file in (options.tests / "trainer").glob(pattern)})
    if not files:
        parser.error(f"{options.tests / 'trainer'} has none of {', '.join(options.files)}: give the folder `tests`.")
    found = {name: {} for name in (STOCK, *options.trainer)}
    for file in files:
        for name, outcomes in found.items():
            outcomes |= run(file, name, options.tests, options.timeout)
            sys.stderr.write(f"{file.name}: {name}\n")
    sys.stdout.write("\n".join(told(found)) + "\n")
    return int(any(failures(found[STOCK], found[name]) for name in options.trainer))


def run(file: Path, trainer: str, tests: Path, timeout: int) -> Outcomes:
    """The outcome of each test of a file, in a process whose `transformers.Trainer` is `trainer`."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "scripts.checks.trainer_in_place", str(file.resolve()),
                   f"--junitxml={report}", f"--rootdir={tests.resolve().parent}"]  # fmt: skip
        places = [str(root), str(root / "triton_kernels" / "torch-ext"), str(tests.resolve().parent)]
        environment = {**os.environ, "HFC_TRAINER": trainer, "CUDA_VISIBLE_DEVICES": "", "WANDB_DISABLED": "true",
                       "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        try:
            ended = subprocess.run(
                command, env=environment, cwd=folder, timeout=timeout, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return {f"{file.stem}: not ended after {timeout} s": "failed"}
        if not report.is_file():
            return {f"{file.stem}: {(ended.stderr or ended.stdout).strip()[-200:]}": "failed"}
        return outcomes_of(report)


def outcomes_of(report: Path) -> Outcomes:
    """What a JUnit report says of each test. A failure by a sentence of ours before training is a refusal."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        texts = [f"{one.get('message')} {one.text}" for one in case if one.tag in ("failure", "error")]
        if texts:
            found[name] = "refused" if all("NotApplicable" in text for text in texts) else "failed"
        else:
            found[name] = "skipped" if case.find("skipped") is not None else "passed"
    return found


def failures(stock: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """What fails with ours and not with the stock Trainer; a test that is no longer there counts."""
    return sorted(
        {name for name, outcome in stock.items() if outcome == "passed" and ours.get(name, "failed") == "failed"}
        | {name for name, outcome in ours.items() if outcome == "failed" and name not in stock}
    )


def told(found: Mapping[str, Mapping[str, str]]) -> Sequence[str]:
    stock = found[STOCK]
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    broken = sorted(name for name, outcome in stock.items() if outcome == "failed")
    lines = [f"{STOCK}: {len(passed)} pass, {len(broken)} fail here, {len(stock) - len(passed) - len(broken)} skipped"]
    lines += [f"    {name}" for name in broken]
    for name in list(found)[1:]:
        refused = sorted(test for test in passed if found[name].get(test) == "refused")
        apply, failed = len(passed) - len(refused), failures(stock, found[name])
        lines.append(f"{name}: {apply - len(failed)} of {apply} pass; {len(refused)} do not apply")
        lines += [f"    {test}" for test in failed] + [f"    (refused) {test}" for test in refused]
    return lines


if __name__ == "__main__":
    sys.exit(main())
