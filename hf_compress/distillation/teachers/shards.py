"""A dataset written in parts, each beside its place and renamed: a run that was stopped goes on where it was."""

import json
import logging
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import pyarrow
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout

from hf_compress.files.whole import beside, file_digest, remove_leftovers, write_whole

logger = logging.getLogger(__name__)

SETTINGS, LOCK = "settings.json", ".lock"


class Shards:
    """The folder `path` of a dataset made from `num_rows` rows, `rows_per_shard` at a time, by one process at a time.

    Raises ValueError for a folder that was begun with other `settings` (a dict of JSON values).
    """

    def __init__(self, path: str | Path, settings: dict, *, num_rows: int, rows_per_shard: int):
        self.path = Path(path)
        self.ranges = row_ranges(num_rows, rows_per_shard)
        settings = json.loads(json.dumps({**settings, "num_rows": num_rows, "rows_per_shard": rows_per_shard}))
        file = self.path / SETTINGS
        if self.path.is_dir() and not file.is_file() and any(p.name != LOCK for p in self.path.iterdir()):
            raise ValueError(f"{path} is a folder with other files in it: expected a new one, or one to go on with.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            logger.warning("Another process writes %s: waiting for it to finish.", path)
            self._lock.acquire()
        remove_leftovers(self.path)
        if file.is_file():
            self._check(file, settings)
        else:
            write_whole(file, json.dumps(settings, indent=1))

    def _check(self, file: Path, settings: dict) -> None:
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({error}). Choose another folder, or remove this one.") from error
        other = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        if other:
            raise ValueError(
                f"{self.path} holds a dataset made with other settings: "
                + "; ".join(f"{k} was {found.get(k)!r}, now {settings.get(k)!r}" for k in other)
                + ". Choose another folder, or remove this one."
            )

    def file(self, number: int) -> Path:
        return self.path / f"part-{number:05}.arrow"

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet, or were altered: to open such a one can end the process."""
        return [number for number in range(len(self.ranges)) if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        file, digest = self.file(number), self._digest(number)
        if not (file.is_file() and digest.is_file()):
            return False
        is_whole = digest.read_text(encoding="utf-8", errors="replace").strip() == file_digest(file)
        if not is_whole:
            logger.warning("Writing %s again: it was altered.", file)
        return is_whole

    def _digest(self, number: int) -> Path:
        """The SHA-256 of a part, written after it."""
        return self.file(number).with_suffix(".sha256")

    def write(self, number: int, part: Dataset) -> None:
        table = part.with_format("arrow")[:].cast(part.features.arrow_schema)

        with (
            beside(self.file(number)) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        write_whole(self._digest(number), file_digest(self.file(number)))

    def load(self) -> Dataset:
        """All parts, one after the other, read from disk as they are used. Others may write from now on."""
        self._lock.release()
        return concatenate_datasets([Dataset.from_file(str(self.file(i))) for i in range(len(self.ranges))])


def row_ranges(num_rows: int, rows_per_shard: int) -> list[range]:
    return [range(start, min(start + rows_per_shard, num_rows)) for start in range(0, num_rows, rows_per_shard)]


def data_fingerprint(rows: Iterable[object]) -> str:
    """A hash of what the rows say, the same in every process."""
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
