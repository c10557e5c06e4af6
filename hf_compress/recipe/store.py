"""Where the results of stages lie: each in a folder of its own, made beside it and renamed when it is whole.

output/stages/02-distil-3f9c01d2a4b5e678/           a finished stage: stage.json and, where it changed one, model/
output/stages/02-distil-3f9c01d2a4b5e678.partial/   one that was cut off, with its trainer's checkpoints
output/model/                                       a copy of the last stage's model
"""

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_compress.recipe.options import RecipeError
from hf_compress.training.resume import DISCARDED, discard, publish

logger = logging.getLogger(__name__)

RECORD = "stage.json"
PARTIAL = ".partial"


class Store:
    """The folder that a recipe writes to. Raises RecipeError if nothing can be written there."""

    def __init__(self, output: str | Path):
        self.output = Path(output)
        try:
            (self.output / "stages").mkdir(parents=True, exist_ok=True)
            probe = self.output / "stages" / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise RecipeError(f"Nothing can be written to {output}: {error.strerror}. Choose another output.") from None

    def folder(self, number: int, name: str, fingerprint: str) -> Path:
        return self.output / "stages" / f"{number:02d}-{name}-{fingerprint}"

    def record(self, folder: Path) -> dict[str, Any] | None:
        """What a finished stage left, None if it is not there or no longer whole."""
        file = folder / RECORD
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in record["files"] if (folder / name).is_file()}
            whole = sizes == record["files"]
        except (ValueError, KeyError, TypeError):  # what a disk left that lost its power
            whole = False
        if not whole:
            logger.warning("%s was changed since it was made: the stage runs again.", folder.name)
            return None
        return record

    def begin(self, folder: Path) -> Path:
        """The folder to work in; what an interrupted run left there is kept for the stage to go on from."""
        if folder.exists():
            shutil.rmtree(folder)  # not whole, see `record`
        partial = folder.with_name(folder.name + PARTIAL)
        partial.mkdir(exist_ok=True)
        for left in partial.glob(f"{DISCARDED}*"):
            shutil.rmtree(left)
        return partial

    def finish(self, folder: Path, record: dict[str, Any]) -> None:
        """Rename the working folder of a stage that is done, once the disk holds it; from then on it counts."""
        partial = folder.with_name(folder.name + PARTIAL)
        discard(partial / "trainer")  # checkpoints: what they were for is there
        files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        files.pop(RECORD, None)
        (partial / RECORD).write_text(json.dumps({**record, "files": files}, indent=2), encoding="utf-8")
        publish(partial, folder)

    def copy_out(self, source: Path, name: str) -> Path:
        """Copy a file or folder of a stage to `output/name`, whole or not at all."""
        target, beside = self.output / name, self.output / f".{name}{PARTIAL}"
        _remove(beside)
        if source.is_dir():
            shutil.copytree(source, beside)
            old = self.output / f".{name}.old"
            _remove(old)
            with suppress(FileNotFoundError):
                target.rename(old)
            beside.rename(target)
            _remove(old)
        else:
            shutil.copy2(source, beside)
            beside.replace(target)
        return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
