"""A dataset written in parts, each beside its place and renamed: a run that was stopped goes on where it was."""

import json
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import pyarrow
from datasets import Dataset, concatenate_datasets

SETTINGS = "settings.json"


class Shards:
    """The folder `path` of a dataset made from `num_rows` rows, `rows_per_shard` at a time.

    Raises ValueError for a folder that was begun with other `settings` (a dict of JSON values).
    """

    def __init__(self, path: str | Path, settings: dict, *, num_rows: int, rows_per_shard: int):
        self.path = Path(path)
        self.ranges = row_ranges(num_rows, rows_per_shard)
        settings = json.loads(json.dumps({**settings, "num_rows": num_rows, "rows_per_shard": rows_per_shard}))
        file = self.path / SETTINGS
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            other = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
            if other:
                raise ValueError(
                    f"{path} holds a dataset made with other settings: "
                    + "; ".join(f"{k} was {found.get(k)!r}, now {settings.get(k)!r}" for k in other)
                    + ". Choose another folder, or remove this one."
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{path} is a folder with other files in it: expected a new one, or one to go on with.")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            _write_beside(
                file, lambda temporary: temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            )

    def file(self, number: int) -> Path:
        return self.path / f"part-{number:05}.arrow"

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet."""
        return [number for number in range(len(self.ranges)) if not self.file(number).is_file()]

    def write(self, number: int, part: Dataset) -> None:
        table = part.with_format("arrow")[:].cast(part.features.arrow_schema)

        def stream(temporary: Path) -> None:
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)

        _write_beside(self.file(number), stream)

    def load(self) -> Dataset:
        """All parts, one after the other, read from disk as they are used."""
        return concatenate_datasets([Dataset.from_file(str(self.file(i))) for i in range(len(self.ranges))])


def row_ranges(num_rows: int, rows_per_shard: int) -> list[range]:
    return [range(start, min(start + rows_per_shard, num_rows)) for start in range(0, num_rows, rows_per_shard)]


def data_fingerprint(rows: Iterable[object]) -> str:
    """A hash of what the rows say, the same in every process."""
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _write_beside(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(file)
