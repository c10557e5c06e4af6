"""Folders that commands write to: what in them is ours stands in a manifest, and nothing else is ever replaced."""

import json
import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from hf_compress.files.whole import WRITING, beside, file_digest, remove, remove_leftovers, replace_folder, write_whole

MANIFEST = ".hf_compress.json"  # name -> SHA-256 of what we wrote there, of the last two
LOCK = ".hf_compress.lock"
SHOWN = 5  # names in an error


class Output:
    """A folder to write to, held by one process at a time: `with Output(folder) as output: output.write({...})`.

    A new or empty folder, or one with a manifest of ours; with `shared` any folder, whose own files stay. A file that
    we did not write, or that was changed since, is never replaced. Raises ValueError, saying what is in the way.
    """

    def __init__(self, folder: str | Path, *, shared: bool = False):
        self.folder, self.shared = Path(folder), shared
        self._lock = FileLock(self.folder / LOCK)
        self._ours: dict[str, list[str]] = {}
        self._is_alone = not shared  # whether the folder is all ours; what a manifest says counts

    def __enter__(self) -> "Output":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._look()  # before even a lock is left there
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process writes to {self.folder}. Wait for it, or choose another output."
            ) from None
        except OSError as error:
            raise ValueError(
                f"Nothing can be written to {self.folder}: {error.strerror}. Choose another output."
            ) from None
        try:
            self._look()
            if self._is_alone:
                remove_leftovers(self.folder)
            self._announce({})
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def _look(self) -> None:
        """Raise ValueError for a folder of somebody else."""
        self._read()
        found = sorted(path.name for path in self.folder.iterdir() if path.name not in (LOCK, MANIFEST))
        if found and not self._is_alone and not self.shared:
            raise ValueError(
                f"{self.folder} holds {_listed(found)}, which hf_compress did not write there. Choose another output, "
                "a new or empty folder, so that nothing is lost."
            )

    def _read(self) -> None:
        file = self.folder / MANIFEST
        if not file.is_file():
            self._is_alone = not self.shared and all(path.name == LOCK for path in self.folder.iterdir())
            return
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            self._ours, self._is_alone = manifest["files"], manifest["is_alone"] is True
            is_whole = all(isinstance(digests, list) for digests in self._ours.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{file} cannot be read, so nothing here is known to be ours. Choose another output.")

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError if a file, or one in a folder, of these names is not as we left it."""
        others = []
        for name in names:
            place = self.folder / name
            if any((self.folder / parent).is_symlink() for parent in Path(name).parents if parent.name):
                others.append(name)  # it would be written elsewhere
            is_folder = place.is_dir() and not place.is_symlink()
            files = [p for p in place.rglob("*") if p.is_symlink() or not p.is_dir()] if is_folder else [place]
            others += [str(p.relative_to(self.folder)) for p in files if (p.exists() or p.is_symlink())
                       and not self._is_ours(p)]  # fmt: skip
        if others:
            raise ValueError(
                f"{_listed(others)} in {self.folder} would be replaced, but hf_compress did not write it, or it was "
                "changed since. Move it away, or choose another output."
            )

    def _is_ours(self, path: Path) -> bool:
        digests = self._ours.get(path.relative_to(self.folder).as_posix(), ())
        return bool(digests) and path.is_file() and not path.is_symlink() and file_digest(path) in digests

    def _announce(self, digests: Mapping[str, str]) -> None:
        """Say what comes, with the digest of what is there now: a kill leaves either of them known as ours."""
        there = {name: old for name, old in self._ours.items() if (self.folder / name).is_file()}
        for name, digest in digests.items():
            old = [file_digest(self.folder / name)] if name in there else []
            there[name] = list(dict.fromkeys([*old, digest]))
        self._ours = there
        write_whole(
            self.folder / MANIFEST, json.dumps({"version": 1, "is_alone": self._is_alone, "files": there}, indent=1)
        )

    def write(self, files: Mapping[str, str | bytes | Path]) -> None:
        """Write texts (as UTF-8), bytes and copies of files, each whole or not at all.

        Raises ValueError before any if one would replace what is not ours.
        """
        content = {name: one.encode() if isinstance(one, str) else one for name, one in files.items()}
        self.check(content)
        self._announce({name: file_digest(one) if isinstance(one, Path) else sha256(one).hexdigest()
                        for name, one in content.items()})  # fmt: skip
        for name, one in content.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with beside(self.folder / name) as place:
                shutil.copyfile(one, place) if isinstance(one, Path) else place.write_bytes(one)

    def copy(self, source: Path, name: str) -> Path:
        """Copy a folder to `name`, whole or not at all. Returns where it is now."""
        target, new = self.folder / name, self.folder / f".{name}{WRITING}"
        self.check([name])
        remove(new)
        shutil.copytree(source, new)
        files = [path for path in new.rglob("*") if path.is_file()]
        self._announce({f"{name}/{path.relative_to(new).as_posix()}": file_digest(path) for path in files})
        replace_folder(new, target)
        return target

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that we wrote. Raises ValueError before any if one was changed."""
        names = list(names)
        self.check(names)
        for name in names:
            remove(self.folder / name)


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
