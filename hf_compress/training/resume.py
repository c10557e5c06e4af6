"""Checkpoints that are whole or marked as unfinished, and looked at before resuming."""

import json
import logging
import re
import zipfile
from pathlib import Path

from hf_compress.files.inside import inside
from hf_compress.files.whole import DISCARDED, discard, flush, remove

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # within a checkpoint from its first byte to its last: no reader takes it for one


def begin_checkpoint(checkpoint: Path) -> None:
    """Make the folder, marked as unfinished; torn ones beside it, which kills left, go. Files of the user stay."""
    for mark in checkpoint.parent.glob(f"checkpoint-*/{UNFINISHED}"):
        if mark.parent != checkpoint:
            discard(mark.parent)
    for left in checkpoint.parent.glob(f"{DISCARDED}checkpoint-*"):
        remove(left)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / UNFINISHED).touch()
    flush(checkpoint)
    (checkpoint / "trainer_state.json").unlink(missing_ok=True)


def end_checkpoint(checkpoint: Path) -> None:
    """Take the mark away, once the disk holds all bytes of the folder."""
    for path in [*checkpoint.rglob("*"), checkpoint]:
        if not path.is_symlink():
            flush(path)
    (checkpoint / UNFINISHED).unlink()
    flush(checkpoint)
    flush(checkpoint.parent)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest whole `checkpoint-N` in `folder`, or None. Torn ones are named in a warning and passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    checkpoints = [p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        fault = find_fault(checkpoint)
        if fault is None and (checkpoint / "optimizer.pt").is_file() and not any(checkpoint.glob("rng_state*.pth")):
            fault = "rng_state.pth is missing: it may be half deleted"
        if fault is None:
            return str(checkpoint)
        logger.warning("Passing over %s: %s", checkpoint, fault)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder of `Trainer`, in words; None if nothing can be seen.

    One of ours that is not whole is marked. `trainer_state.json` is written last, so a checkpoint that has it was
    written to its end; each safetensors file says in its header how long it has to be, each file of torch ends in its
    table of contents, an index names its shards.
    """
    state = checkpoint / "trainer_state.json"
    if (checkpoint / UNFINISHED).exists():
        return "it was not written to its end"
    if not state.is_file():
        return "trainer_state.json, written last, is missing"
    for file in (state, *sorted(checkpoint.glob("*.index.json"))):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            names = () if file == state else sorted(set(content["weight_map"].values()))
            shards = {name: inside(checkpoint, name) for name in names}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{file.name} cannot be read ({error})"
        for name, shard in shards.items():
            if not shard.is_file():
                return f"{name}, named by {file.name}, is missing"
    for file in sorted(checkpoint.glob("*.safetensors")):
        if (fault := _safetensors_fault(file)) is not None:
            return f"{file.name} {fault}"
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")]):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short at {file.stat().st_size} bytes"
    return None


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
