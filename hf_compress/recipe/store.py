"""Where the results of stages lie: each in a folder of its own, made beside it and renamed when it is whole.

output/stages/02-distil-3f9c01d2a4b5e678/           a finished stage: stage.json and, where it changed one, model/
output/stages/02-distil-3f9c01d2a4b5e678.partial/   one that was cut off, with its trainer's checkpoints
output/model/                                       a copy of the last stage's model
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_compress.files.inside import inside
from hf_compress.files.output import Output
from hf_compress.files.whole import DISCARDED, discard, remove, replace_folder, write_whole
from hf_compress.measuring.identity import weight_files
from hf_compress.recipe.stage import Stage, Work
from hf_compress.report.score import is_share
from hf_compress.report.tables import size_text
from hf_compress.training.ranks import is_main, wait_for_all
from hf_compress.version import __version__

logger = logging.getLogger(__name__)

RECORD = "stage.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"


class Store(Output):
    """The folder that a recipe writes to, see `Output`. Raises ValueError if nothing can be written there."""

    def __enter__(self) -> "Store":
        if is_main():  # of several processes one writes
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if is_main():
            super().__exit__(*error)

    def check(self, names: Iterable[str]) -> None:
        if is_main():
            super().check(names)

    def place(self, number: int, name: str, fingerprint: str) -> Path:
        """Where the result of a stage belongs."""
        return self.folder / "stages" / f"{number:02d}-{name}-{fingerprint}"

    def partial(self, folder: Path) -> Path:
        """Where it is worked on until it is whole."""
        return folder.with_name(folder.name + PARTIAL)

    def record(self, folder: Path) -> dict[str, Any] | None:
        """What a finished stage left, None if it is not there or no longer whole."""
        file = folder / RECORD
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            files = {name: inside(folder, name) for name in record["files"]}
            whole = {n: file.stat().st_size for n, file in files.items() if file.is_file()} == record["files"]
        except (ValueError, KeyError, TypeError):  # what a disk left that lost its power
            whole = False
        if not whole:
            logger.warning("%s was changed since it was made: the stage runs again.", folder.name)
            return None
        return {**record, "folder": folder.name}

    def seconds_before(self, name: str) -> float | None:
        """What a stage of that name took last time, with other options or on other texts."""
        folders = sorted((self.folder / "stages").glob(f"??-{name}-*/{RECORD}"), key=lambda file: file.stat().st_mtime)
        records = [record for record in map(self.record, (file.parent for file in folders)) if record]
        times = [record.get("seconds") for record in records if record["name"] == name]  # no student-8-bit for student
        return times[-1] if times else None

    def make(self, stage: Stage, folder: Path, fingerprint: str, work: Work) -> dict[str, Any]:
        """Let a stage run, in a folder that counts once it is done. Returns its record."""
        start = time.time()
        record = {"name": stage.name, "kind": stage.kind, "options": dict(stage.given), "folder": folder.name,
                  "fingerprint": fingerprint, "version": __version__}  # fmt: skip
        if is_main():
            self.begin(folder)
        wait_for_all()
        if stage.everywhere or is_main():
            record |= stage.run(work)
        wait_for_all()
        if is_main():
            self.finish(folder, {**record, "seconds": round(time.time() - start, 1)})
        wait_for_all()
        return self.record(folder)

    def begin(self, folder: Path) -> Path:
        """The folder to work in; what an interrupted run left there is kept for the stage to go on from."""
        if folder.exists():  # not whole, see `record`: what somebody put there or changed is not ours to delete
            number = 1
            while (aside := folder.with_name(f"{folder.name}{DAMAGED}-{number}")).exists():
                number += 1
            folder.rename(aside)
            logger.warning("What is left of %s is kept as %s.", folder.name, aside.name)
        partial = self.partial(folder)
        partial.mkdir(parents=True, exist_ok=True)
        for left in partial.glob(f"{DISCARDED}*"):
            remove(left)
        return partial

    def finish(self, folder: Path, record: dict[str, Any]) -> None:
        """Rename the working folder of a stage that is done, once the disk holds it; from then on it counts."""
        partial = self.partial(folder)
        discard(partial / "trainer")  # checkpoints: what they were for is there
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        files.pop(RECORD, None)
        write_whole(partial / RECORD, json.dumps({**record, "files": files}, indent=2))
        replace_folder(partial, folder)
        logger.warning("    %s", reached(record, folder / "model"))


def reached(record: Mapping[str, Any], model: Path) -> str:
    """What a finished stage came to, in a line: how its model does, how large it is, how long it took."""
    figures, parts = record.get("figures", {}), [record["told"]] if "told" in record else []
    if found := figures.get("validation"):
        value = f"{found['value']:.1%}" if is_share(found["metric"]) else f"{found['value']:.4g}"
        parts.append(f"{value} {found['metric']} on {found['texts']:,} validation texts")
    if "last_losses" in figures:
        parts.append(f"loss {figures['last_losses']['loss']:.4g}")
    if model.is_dir():
        parts.append(size_text(sum(file.stat().st_size for file in weight_files(model))))
    return ", ".join([*parts, *([f"{record['seconds']:.0f} s"] if "seconds" in record else [])])
