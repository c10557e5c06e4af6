"""Files and folders that are whole or not there: written beside their place, flushed to the disk, renamed."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

WRITING = ".writing"  # ends the name of a file until it is whole
REPLACED = ".replaced-"  # a folder of the same name, until the new one is in its place
DISCARDED = ".discarded-"  # before the name of what is being deleted: half of it is nothing


@contextmanager
def beside(file: Path) -> Iterator[Path]:
    """A place beside `file` to write to: it becomes `file` when the block ends, and is gone where that fails.

    A link at `file` is replaced, not followed. A kill leaves the old file or the new one.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{WRITING}")  # of several machines on one disk, too
    try:
        yield temporary
        flush(temporary)
        temporary.replace(file)
        flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write `file`, text as UTF-8, so that a kill leaves what was there or all of `content`."""
    with beside(file) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_free(folder: Path) -> None:
    """Raise ValueError unless `folder` is new, or empty and can be replaced: nothing of anyone's is lost."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Choose another folder, so that nothing is lost.")
    if folder.resolve() == Path.cwd() or folder.is_mount():
        raise ValueError(f"{folder} cannot be replaced by a folder that is whole. Name a new one in it.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its name when the block ends well, and goes when it does not.

    One process at a time; what a killed one left goes first. Raises ValueError for a `folder` that holds something.
    """
    check_free(folder)
    place = folder.resolve()
    new, lock = place.with_name(f".{place.name}{WRITING}"), place.with_name(f".{place.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(lock)
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"Another process writes {folder}. Wait for it, or choose another folder.") from None
    try:
        check_free(folder)  # of the process that held the lock before
        remove(new)
        new.mkdir()
        yield new
        replace_folder(new, place)
    finally:
        remove(new)
        lock.unlink(missing_ok=True)
        held.release()


def remove_leftovers(folder: Path) -> None:
    """Undo what kills left half done in `folder`. Only for who alone writes there."""
    for left in folder.glob(f".*{WRITING}"):
        remove(left)
    for replaced in folder.glob(f"{REPLACED}*"):
        put_back(replaced.with_name(replaced.name.removeprefix(REPLACED)))


def replace_folder(new: Path, place: Path) -> None:
    """Rename the folder `new` to `place`, instead of what is there, once the disk holds all its bytes."""
    for path in [*new.rglob("*"), new]:
        if not path.is_symlink():
            flush(path)
    replaced = put_back(place)
    if place.exists() or place.is_symlink():
        place.rename(replaced)
    new.rename(place)
    flush(place.parent)
    remove(replaced)


def put_back(place: Path) -> Path:
    """The name of what `replace_folder` replaces, cleared: a kill between its two renames left the old folder there."""
    replaced = place.with_name(f"{REPLACED}{place.name}")
    if place.exists():
        remove(replaced)
    elif replaced.exists():
        replaced.rename(place)
    return replaced


def discard(folder: Path) -> None:
    """Delete `folder`, if it is there, so that a kill leaves all of it or nothing under its name."""
    gone = folder.with_name(f"{DISCARDED}{folder.name}")
    remove(gone)
    if folder.is_symlink() or folder.exists():
        folder.rename(gone)
        remove(gone)


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link, never what a link leads to; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the disk holds the file or the folder's entries."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    content = hashlib.sha256()  # hashlib.file_digest is of Python 3.11
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            content.update(piece)
    return content.hexdigest()
