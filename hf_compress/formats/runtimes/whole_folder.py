"""A folder that is there whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECORD = "hf_compress.json"  # what is inside, and how far it agreed with the model it was written from


def check_free(folder: Path) -> None:
    """Raise ValueError unless `folder` is new or empty: nothing of anyone's is lost."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty. Choose another folder, so that nothing is lost.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its name when the block ends well, and goes when it does not."""
    check_free(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
