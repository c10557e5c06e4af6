"""Tells a checkpoint that was written to its end from one that a kill or a full disk tore."""

import json
import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest whole `checkpoint-N` in `folder`, or None. Torn ones are named in a warning and passed over."""
    if not Path(folder).is_dir():
        return None
    checkpoints = [p for p in Path(folder).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    for checkpoint in sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        logger.warning("Passing over %s: %s", checkpoint, fault)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder of `Trainer`, in words; None if nothing can be seen.

    `trainer_state.json` is written last, so a checkpoint that has it was written to its end; each safetensors file says
    in its header how long it has to be.
    """
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return "trainer_state.json, written last, is missing"
    try:
        json.loads(state.read_text())
    except ValueError as error:
        return f"trainer_state.json cannot be read ({error})"
    for file in sorted(checkpoint.glob("*.safetensors")):
        if (fault := _safetensors_fault(file)) is not None:
            return f"{file.name} {fault}"
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
