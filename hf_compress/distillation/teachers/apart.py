"""Workers that were started apart write one teacher cache: a part of the text each, and nobody in charge.

The text is cut into parts, in its order. A worker takes a part that nobody has by a lease, a file that it writes anew
while it works. A lease that has not changed for a while was that of a worker that is gone: another takes the part. Each
part becomes a shard, and then a note that names the shard. There is one note a part, so no example is there twice even
where two workers made the same part. Whoever finds a note of every part writes the manifest, in the order of the text.
"""

import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from hf_compress.distillation.teachers.cache_contents import Outputs, Rows, together
from hf_compress.distillation.teachers.cache_files import (
    MANIFEST,
    check_same_cache,
    check_settings,
    find_faults,
    packed_shard,
    read_manifest,
    settings_of,
    write_manifest,
)
from hf_compress.distillation.teachers.manifest import is_shard
from hf_compress.files.store import Store
from hf_compress.training.progress import progress_bar

logger = logging.getLogger(__name__)

MOST_WAIT = 5.0  # seconds between two looks at what others do
RENEWALS = 4  # of a lease, and looks at others', in the time after which one counts as given up
ENVIRONMENTS = (  # number, count and first number: of torchrun and accelerate, a Slurm array, the tasks of a Slurm job
    ("RANK", "WORLD_SIZE", ""),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
)


def worker_here() -> tuple[int, int]:
    """The number of this worker and how many there are, as the launcher says; (0, 1) for one alone."""
    for number, count, first in ENVIRONMENTS:
        if number in os.environ and count in os.environ:
            return int(os.environ[number]) - int(os.environ.get(first, 0)), int(os.environ[count])
    return 0, 1


def sum_of(keys: Tensor) -> str:
    """What tells some examples from others, in 64 bits."""
    return f"{keys.sum().item() & (2**64 - 1):016x}"


class Parts:
    """The text of `rows` in parts of `size` rows. `keys`, of its first examples, tell it from another text."""

    def __init__(self, rows: Rows, size: int, keys: Tensor):
        self.rows, self.size = rows, size
        self.count = None if rows.is_stream else -(-len(rows) // size)  # of a stream known after it was read
        self.description = {
            "rows": None if rows.is_stream else len(rows),
            "size": size,
            "first": sum_of(keys),
        }

    def read(self, begin: int) -> Iterator[tuple[int, Callable[[], list]]]:
        number = -1
        for number, read in self.rows.parts(self.size, begin):
            yield number, read
        self.count = number + 1 if self.count is None else self.count


class Leases:
    """This worker's leases in `store`; others count as given up when they have not changed for `seconds`."""

    def __init__(self, store: Store, seconds: float):
        self.store, self.seconds, self._me = store, seconds, uuid.uuid4().hex
        self._written, self._renewed = 0, 0.0
        self._seen: dict[int, tuple[bytes, float]] = {}  # what others' leases held, and since when, by the clock here

    def take(self, number: int) -> bool:
        """Whether the part is this worker's now."""
        name, mine, now = _lease(number), self._content(), time.monotonic()
        if self.store.create(name, mine):
            return True
        found = self.store.read(name)
        if found is None:
            return False  # just given back
        if self._seen.setdefault(number, (found, now))[0] != found:
            self._seen[number] = found, now
        if now - self._seen[number][1] < self.seconds:
            return False
        logger.warning("Taking over part %d of %s, whose worker is gone.", number, self.store)
        self.store.write(name, mine)
        return self.store.read(name) == mine

    def renew(self, number: int) -> None:
        if time.monotonic() - self._renewed >= self.seconds / RENEWALS:
            self.store.write(_lease(number), self._content())

    def give_back(self, number: int) -> None:
        self.store.remove(_lease(number))

    def _content(self) -> bytes:
        self._written, self._renewed = self._written + 1, time.monotonic()
        return f"{self._me} {self._written}".encode()


def write_parts(
    leases: Leases, manifest: dict, outputs: Outputs, parts: Parts, *, worker: tuple[int, int], batch_size: int
) -> None:
    """Do this worker's share of a cache, wait for the others' last parts or take them over, and write the manifest.

    Raises ValueError where the cache that is there was begun for other data, another teacher or other settings.
    """
    store = leases.store
    if not 0 <= worker[0] < worker[1]:
        raise ValueError(f"worker is a number from 0 and how many there are, such as (0, 4), got {worker}.")
    manifest = {**manifest, "text": parts.description}
    if _is_there(store, manifest):
        return
    begin = 0 if parts.count is None else worker[0] * parts.count // worker[1]
    held: set[int] = set()
    while True:
        done = set(_notes(store.sizes()))
        for number, read in progress_bar(parts.read(begin), desc="Running the teacher", unit="part", total=parts.count):
            if number in done or not (number in held or leases.take(number)):
                continue
            try:
                if store.read(_note(number)) is None:  # nobody has finished it since
                    batches = outputs.batches(parts.rows, read(), set(), batch_size)
                    _write_part(leases, number, batches, _mark(manifest))
            finally:
                leases.give_back(number)
        if not parts.count:
            raise ValueError("The stream gave no example when it was read again: can it be read only once?")
        while missing := set(range(parts.count)) - set(_notes(store.sizes())):
            if held := {number for number in missing if leases.take(number)}:
                break
            time.sleep(min(MOST_WAIT, leases.seconds / RENEWALS))
        if not missing and _finish(store, manifest, parts.count):
            return


def _is_there(store: Store, manifest: dict) -> bool:
    """Whether the cache is complete and whole. Begins one that is not there; what is damaged will be written anew."""
    if store.read(MANIFEST) is None:
        write_manifest(store.address, {**manifest, "is_complete": False, "shards": {}})
    found = read_manifest(store.address)  # another worker's, perhaps, which began at the same instant
    check_same_cache(store.address, found, manifest)
    if "text" not in found:
        raise ValueError(
            f"The cache in {store} was not written by workers started apart. Choose another folder, or leave `worker` "
            "out to add examples to it."
        )
    check_settings(store.address, found, manifest, ["text"])
    faults = find_faults(store.address, found["shards"])
    for number in _notes(store.sizes()) if faults else ():
        name, _, _ = _read_note(store, number)
        if name in faults:
            logger.warning("Writing part %d of %s again: %s %s.", number, store, name, faults[name])
            store.remove(_note(number))
    return found["is_complete"] and not faults


def _mark(manifest: dict) -> str:
    """What tells the parts of a cache from those of a worker that was given something else."""
    return hashlib.sha256(json.dumps([settings_of(manifest), manifest["text"]]).encode()).hexdigest()[:16]


def _write_part(leases: Leases, number: int, batches: Iterable[dict[str, Tensor]], mark: str) -> None:
    held = []
    for tensors in batches:
        held.append(tensors)
        leases.renew(number)
    name, data, entry = packed_shard(together(held))
    if leases.store.read(_note(number)) is not None:
        return  # another took it over, and was faster
    leases.store.write(name, data)
    leases.store.write(_note(number), json.dumps({"name": name, "of": mark, **entry}).encode())


def _finish(store: Store, manifest: dict, count: int) -> bool:
    """Write the manifest, if every part is there; whether that is so."""
    sizes = store.sizes()
    shards = {}
    for number in range(count):
        name, mark, entry = _read_note(store, number) if _note(number) in sizes else (None, "", {})
        if name is None or sizes.get(name) != entry["size_bytes"]:
            store.remove(_note(number))  # of a shard that is gone
            return False
        if mark != _mark(manifest):
            raise ValueError(
                f"Part {number} of the cache in {store} was written by a worker with another teacher, other data or "
                "other settings, which began at the same time. Choose another folder, and give all workers the same."
            )
        shards[name] = entry
    write_manifest(store.address, {**manifest, "is_complete": True, "shards": shards})
    for name in sizes:  # what workers left that are gone
        if re.fullmatch(r"part-\d+\.lease|shard-[0-9a-f]{16}\.safetensors", name) and name not in shards:
            store.remove(name)
    return True


def _lease(number: int) -> str:
    return f"part-{number:06}.lease"


def _note(number: int) -> str:
    return f"part-{number:06}.json"


def _notes(names: Iterable[str]) -> list[int]:
    return [int(found[1]) for name in names if (found := re.fullmatch(r"part-(\d+)\.json", name))]


def _read_note(store: Store, number: int) -> tuple[str | None, str, dict]:
    """The shard of a part, the mark of its cache, and its entry in the manifest; None for a note that is none."""
    try:
        entry = json.loads(store.read(_note(number)) or b"")
        name, mark = entry.pop("name"), entry.pop("of")
    except (ValueError, AttributeError, KeyError):
        return None, "", {}
    return (name, mark, entry) if is_shard(name, entry) else (None, "", {})
