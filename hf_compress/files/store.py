"""Files of one folder, on this machine or at an address of fsspec (`s3://`, `gs://`, `hf://`, `memory://`)."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from hf_compress.files.whole import write_whole


def is_remote(address: str | Path) -> bool:
    """Whether `address` is one of fsspec and no path on this machine."""
    return "://" in str(address) and not str(address).startswith("file://")


class Store:
    """The folder at `address`, whose files are written whole.

    Raises ValueError, naming the address, where it cannot be used: a protocol that is not installed, no permission, no
    answer.
    """

    def __init__(self, address: str | Path):
        self.address = str(address)
        self.folder = None if is_remote(address) else Path(self.address.removeprefix("file://"))
        if self.folder is None:
            with self._told(ImportError, ValueError):
                from fsspec.core import url_to_fs  # heavy, and paths need none of it

                self._fs, self._root = url_to_fs(self.address)

    def __str__(self) -> str:
        return self.address

    @contextmanager
    def _told(self, *kinds: type[Exception]) -> Iterator[None]:
        try:
            yield
        except (OSError, *kinds) as error:
            if isinstance(error, FileNotFoundError) and FileNotFoundError not in kinds:
                raise  # a file that is asked for and not there
            raise ValueError(f"{self.address} cannot be used: {error}. Look at the address and your access.") from error

    def sizes(self) -> dict[str, int]:
        """The files that are there, and their bytes."""
        if self.folder is not None:
            found = {}
            for file in self.folder.iterdir() if self.folder.is_dir() else ():
                with suppress(FileNotFoundError):  # which another has removed since: a lease that was given back
                    state = file.stat()
                    if S_ISREG(state.st_mode):
                        found[file.name] = state.st_size
            return found
        try:
            with self._told():
                self._fs.invalidate_cache()  # others write there
                found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {one["name"].rpartition("/")[2]: one["size"] for one in found if one["type"] == "file"}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Bytes `start` to `end` of a file; None where there is none."""
        try:
            with self._told():
                if self.folder is None:
                    return self._fs.cat_file(f"{self._root}/{name}", start=start, end=end)
                with (self.folder / name).open("rb") as file:
                    file.seek(start)
                    return file.read(-1 if end is None else end - start)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        with self._told(FileNotFoundError):  # a bucket that is not there
            if self.folder is None:
                return self._fs.pipe_file(f"{self._root}/{name}", content)
            self.folder.mkdir(parents=True, exist_ok=True)
            return write_whole(self.folder / name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; whether this process did so.

        Of several at once, one on this machine; in a store without such a call, perhaps two that ask at one instant.
        """
        if self.folder is None:
            if self.read(name) is not None:
                return False
            self.write(name, content)
            return self.read(name) == content
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with (self.folder / name).open("xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._told(), suppress(FileNotFoundError):
            (self.folder / name).unlink() if self.folder is not None else self._fs.rm_file(f"{self._root}/{name}")
