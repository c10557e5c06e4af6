"""Checkpoints that are whole or not there: written beside their place, renamed, and looked at before resuming."""

import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"  # before the name of a checkpoint while it is written: no reader takes it for one
DISCARDED = ".discarded-"  # before the name of what is being deleted: half of it is no checkpoint
REPLACED = ".replaced-"  # a checkpoint of the same name, until the new one is in its place


def remove_leftovers(folder: Path) -> None:
    """Delete what kills in the middle of a save left in `folder`, where checkpoints are written."""
    for left in _leftovers(folder):
        shutil.rmtree(left)


def start_writing(checkpoint: Path) -> Path:
    """The folder in which `checkpoint` is written until `publish`."""
    folder = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(folder: Path, checkpoint: Path) -> None:
    """Rename `folder` to `checkpoint`, in the place of one that was there, once the disk holds all its bytes."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)
    replaced = checkpoint.with_name(f"{REPLACED}{checkpoint.name}")
    if checkpoint.exists():
        checkpoint.rename(replaced)
    folder.rename(checkpoint)
    _flush(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete `folder`, if it is there, so that a kill leaves all of it or nothing under its name."""
    gone = folder.with_name(f"{DISCARDED}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest whole `checkpoint-N` in `folder`, or None. Torn ones are named in a warning and passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for left in _leftovers(folder):
        if left.name.startswith(UNFINISHED):
            logger.warning("Passing over %s: it was not written to its end", left)
    checkpoints = [p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        logger.warning("Passing over %s: %s", checkpoint, fault)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder of `Trainer`, in words; None if nothing can be seen.

    `trainer_state.json` is written last, so a checkpoint that has it was written to its end; each safetensors file says
    in its header how long it has to be, each file of torch ends in its table of contents, an index names its shards.
    """
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return "trainer_state.json, written last, is missing"
    for file in (state, *sorted(checkpoint.glob("*.index.json"))):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{file.name} cannot be read ({error})"
        for shard in sorted(set(content.get("weight_map", {}).values())) if file != state else ():
            if not (checkpoint / shard).is_file():
                return f"{shard}, named by {file.name}, is missing"
    for file in sorted(checkpoint.glob("*.safetensors")):
        if (fault := _safetensors_fault(file)) is not None:
            return f"{file.name} {fault}"
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")]):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short at {file.stat().st_size} bytes"
    if (checkpoint / "optimizer.pt").is_file() and not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing: it may be half deleted"
    return None


def _leftovers(folder: Path) -> list[Path]:
    """What a kill left in the middle of a save."""
    return sorted([*folder.glob(f"{UNFINISHED}checkpoint-*"), *folder.glob(f"{REPLACED}checkpoint-*")])


def _flush(path: Path) -> None:
    """Wait until the disk holds the file or the folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safetensors_fault(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 + header_size:
            return f"is cut short at {size} bytes"
        try:
            header = json.loads(stream.read(header_size))
            expected = (
                8
                + header_size
                + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
            )
        except (ValueError, KeyError, TypeError) as error:
            return f"has an unreadable header ({error})"
    return None if size == expected else f"has {size} bytes where its header says {expected}"
