"""The losses of five steps of every trainer, kept in trajectories.json: a change that moves one has to say so.

    python tests/invariant/trajectories.py --write      # and commit the file with the reason

Tiny models without dropout on a CPU, in float32. What a step costs is taken as the trainer's `training_step` gives it,
since `Trainer` logs four decimals.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from trust.trainers import TRAINERS, build  # noqa: E402

FILE = Path(__file__).with_name("trajectories.json")
STEPS = 5
RATE = 1e-2  # so that a step moves the next loss by more than another order of sums does


def losses(name: str, folder: Path) -> list[float]:
    """Of the first steps of one trainer, each before its update."""
    torch.set_num_threads(1)
    trainer = build(name, folder, dropout=0.0, max_steps=STEPS, learning_rate=RATE)
    found, step = [], trainer.training_step

    def watched(*args, **kwargs):
        found.append(step(*args, **kwargs))
        return found[-1]

    trainer.training_step = watched
    trainer.train()
    return [float(loss) for loss in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the file; else print what it would hold")
    write = parser.parse_args().write
    found = {}
    for name in TRAINERS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(name, Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    if write:
        FILE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
