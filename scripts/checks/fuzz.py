"""Damage compressed checkpoints at random, load them, and see that nothing but the saved model or an error comes out.

    python scripts/checks/fuzz.py --count 5000 --seed 0
    python scripts/checks/fuzz.py --foreign --count 2000 --seed 0

A mutation is made from (seed, number) alone, so `--only 4711` makes one again. One change or two, of the config and of
the weights, and each load ends in a ValueError or OSError (or in Transformers' own errors for what is its own: tensors
of another shape, and fields of config.json that are not ours), or in the model that was saved: the same tensors, the
same ways of storing them, the same outputs. Values inside a tensor may be others, as long as they are possible ones;
then it is the saved model with these values. That model is the one in memory, never one that was read: what a reader
does not look at is not believed. Checkpoints of others are held against a plain reading of their bits. What else may
happen is told: other errors, code that ran, attributes that no undamaged module has, more than MOST_SECONDS of
processor time or MOST_BYTES of memory for one load. Every 250 loads run in a process of their own, so that a crash is
told too.
"""

import argparse
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.checks.checkpoints import CHECKPOINTS, Checkpoint, attributes, outputs  # noqa: E402
from scripts.checks.damage import damage  # noqa: E402
from scripts.checks.foreign import FOREIGN  # noqa: E402

MOST_SECONDS = 5.0  # a load of these models takes about 0.02
MOST_BYTES = 256 * 2**20  # beyond what the process has had before
MOST_ADDRESSES = 2 * 2**30  # beyond what the process begins with: more is refused by the system, so that it can be told
PER_PROCESS = 250
OF_TRANSFORMERS = {"change_plain_field", "ask_for_code"}  # fields of any config.json, read before ours are


def is_expected(error: Exception, done: list[str], folder: Path) -> bool:
    """Whether a reader of damaged files may raise it. Of a record that is not ours, Transformers tells as it likes."""
    if isinstance(error, (ValueError, OSError)):
        return True
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = any("/hf_compress" in frame.filename for frame in frames)
    names_us = '"quant_method": "hf_compress"' in (folder / "config.json").read_text(encoding="utf-8")
    return (not OF_TRANSFORMERS.isdisjoint(done) or not names_us) and not is_ours


def attempt(checkpoint: Checkpoint, seed: int, number: int, folder: Path) -> tuple[str, str | None]:
    """How one damaged checkpoint ends: what was done and what came of it; and a complaint, if there is one."""
    marker = folder.with_name("ran")
    done = damage(checkpoint.config, checkpoint.weights, random.Random(f"{seed}-{number}"), folder, marker)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, complaint = time.process_time(), None
    try:
        model = checkpoint.load(folder)
        end = "loads"
        if "change_plain_field" not in done:  # a model with another activation is another model
            checkpoint.compare(model, folder)
        kinds = {kind for kind, _ in checkpoint.attributes}  # another `hidden_act` brings another kind
        if unknown := {a for a in attributes(model) - checkpoint.attributes if a[0] in kinds}:
            complaint = f"attributes from outside: {sorted(unknown)[:5]}"
        outputs(model)
    except AssertionError as error:
        end, complaint = "another model", str(error)
    except Exception as error:  # which it is, is the question
        end = type(error).__name__
        if not is_expected(error, done, folder):
            complaint = "".join(traceback.format_exception(error))[-1500:]
    seconds = time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
    if marker.exists():
        complaint = "code from the checkpoint ran"
        marker.unlink()
    if seconds > MOST_SECONDS or memory > MOST_BYTES:
        complaint = f"{seconds:.1f} s of processor time, {memory / 2**20:.0f} MiB more memory"
    return f"{' and '.join(done) or 'nothing'}: {end}", complaint


def fuzz(
    numbers: range, seed: int, folder: Path, foreign: bool = False, kinds: Sequence[str] = ()
) -> tuple[Counter, dict[int, str]]:
    """How often each end was met, and the complaints by number. `kinds` are some of the checkpoints, all by default."""
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    known = FOREIGN if foreign else dict.fromkeys(CHECKPOINTS, Checkpoint)
    checkpoints = [known[name](name, folder / name) for name in kinds or known]
    ends, complaints = Counter(), {}
    for number in numbers:
        (folder / "number").write_text(str(number), encoding="utf-8")
        end, complaint = attempt(checkpoints[number % len(checkpoints)], seed, number, folder / "damaged")
        ends[end] += 1
        if complaint is not None:
            complaints[number] = f"{checkpoints[number % len(checkpoints)].name}, {end}: {complaint}"
    return ends, complaints


def fuzz_apart(
    numbers: range, seed: int, foreign: bool = False, kinds: Sequence[str] = ()
) -> tuple[Counter, dict[int, str]]:
    """`fuzz` in a process of its own, whose death is a complaint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                limit = (
                    int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
                    + MOST_ADDRESSES
                )
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                ends, complaints = fuzz(numbers, seed, folder, foreign, kinds)
                (folder / "result").write_text(json.dumps([ends, complaints]), encoding="utf-8")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            return Counter(), {
                int((folder / "number").read_text(encoding="utf-8")): f"the process ended with status {status}"
            }
        ends, complaints = json.loads((folder / "result").read_text(encoding="utf-8"))
        return Counter(ends), {int(number): text for number, text in complaints.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--foreign", action="store_true", help="GPTQ and compressed-tensors in place of our own")
    parser.add_argument("--only", type=int, help="one number, in this process")
    parser.add_argument("--kinds", nargs="+", default=(), help="some of the checkpoints, by name, all by default")
    run = parser.parse_args()
    if unknown := sorted({*run.kinds} - {*(FOREIGN if run.foreign else CHECKPOINTS)}):
        parser.error(f"there are no checkpoints {unknown}, but {', '.join(FOREIGN if run.foreign else CHECKPOINTS)}.")
    torch.set_num_threads(1)
    start, ends, complaints = time.time(), Counter(), {}
    if run.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            ends, complaints = fuzz(range(run.only, run.only + 1), run.seed, Path(folder), run.foreign, run.kinds)
    else:
        for first in range(0, run.count, PER_PROCESS):
            more, wrong = fuzz_apart(
                range(first, min(first + PER_PROCESS, run.count)), run.seed, run.foreign, run.kinds
            )
            ends += more
            complaints |= wrong
    for end, count in sorted(ends.items()):
        print(f"{count:6d}  {end}")
    for number, complaint in complaints.items():
        print(f"\n{number}: {complaint}")
    print(
        f"\n{sum(ends.values())} mutations, seed {run.seed}: {len(complaints)} complaints, {time.time() - start:.0f} s"
    )
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
