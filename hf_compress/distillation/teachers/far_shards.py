"""Shards of a teacher cache that lie elsewhere: an index of them all, and the few that are being read.

A text that is read in the order in which the cache was written needs each shard once, and the next one is fetched while
one is read.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from hf_compress.distillation.teachers.manifest import check_shard
from hf_compress.files.store import Store

logger = logging.getLogger(__name__)

MOST_SHARDS = 4  # in memory: those that a batch between two of them touches, the next, and one to spare
SIZE_BYTES = 8  # before the header of a safetensors file


class FarShards:
    """The shards `entries` (name -> entry of the manifest) at `address`, by number, each {name: tensor}.

    Raises ValueError for a shard that was altered since.
    """

    def __init__(self, address: str, entries: Mapping[str, Mapping], stored: Mapping[str, str]):
        self.store, self.names, self.entries, self.stored = Store(address), list(entries), entries, stored
        self._held: dict[int, Future] = {}  # the least recently read first
        self._last, self._fetched = -1, set()
        self._is_told = False
        self._pool = ThreadPoolExecutor(1)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        in_order, self._last = number - self._last in (0, 1), number
        for one in (number, number + 1) if in_order else (number,):
            if one in self._held:
                self._held[one] = self._held.pop(one)
            elif one < len(self):
                self._tell_again(one)
                self._held[one] = self._pool.submit(self._fetch, one)
        for old in list(self._held)[:-MOST_SHARDS]:
            del self._held[old]
        return self._held[number].result()

    def _tell_again(self, number: int) -> None:
        if number in self._fetched and not self._is_told:
            logger.warning(
                "Shards of %s are fetched again and again: train on the text in its order (a stream, or "
                "train_sampling_strategy='sequential'), or copy the cache to this machine.", self.store,
            )  # fmt: skip
            self._is_told = True
        self._fetched.add(number)

    def _fetch(self, number: int) -> dict[str, Tensor]:
        name = self.names[number]
        data = self.store.read(name)
        if data is None or hashlib.sha256(data).hexdigest() != self.entries[name]["sha256"]:
            fault = "is missing" if data is None else "was altered since the cache was written"
            raise ValueError(f"{self.store}/{name} {fault}. Call hfc.cache_teacher again: it writes it anew.")
        shard = load(data)
        check_shard(f"{self.store}/{name}", shard, self.stored)
        return shard

    def index_of(self, number: int) -> dict[str, Tensor]:
        """Of one shard what finds its examples, and what has one row an example: few bytes, read by themselves."""
        name = self.names[number]
        try:
            size = int.from_bytes(self.store.read(name, 0, SIZE_BYTES), "little")
            header = json.loads(self.store.read(name, SIZE_BYTES, SIZE_BYTES + size))
            chosen, data = {}, b""
            for key, entry in header.items():
                if key == "keys" or key.endswith("_lengths") or self._is_row(key, entry):
                    begin, end = (SIZE_BYTES + size + offset for offset in entry["data_offsets"])
                    content = self.store.read(name, begin, end)
                    chosen[key] = {**entry, "data_offsets": [len(data), len(data) + len(content)]}
                    data += content
            packed = json.dumps(chosen).encode()
            return load(len(packed).to_bytes(SIZE_BYTES, "little") + packed + data)
        except (TypeError, KeyError, ValueError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{self.store}/{name} is no whole safetensors file: {error}.") from error

    def _is_row(self, name: str, entry: Mapping) -> bool:
        return self.stored.get(name) == "example" and len(entry["shape"]) == 2
