"""Names that a file gives, such as those of shards: they are names of files in its own folder, or refused."""

from pathlib import Path, PureWindowsPath


def inside(folder: str | Path, name: object) -> Path:
    """`folder / name`, for a name read from a file. Raises ValueError unless it lies in `folder`, links followed.

    The files of a Hub snapshot are links into the `blobs` of the same repository, which counts as the folder.
    """
    folder = Path(folder)
    is_name = isinstance(name, str) and name and name.isprintable()
    parts = PureWindowsPath(name).parts if is_name else ()  # splits at / and \ alike
    if not parts or ".." in parts or PureWindowsPath(name).anchor or ":" in name:
        raise ValueError(f"{folder}: {name!r} is no name of a file in this folder.")
    check_inside(folder, folder / name)
    return folder / name


def check_inside(folder: str | Path, path: Path) -> None:
    """Raise ValueError if `path`, which is named in `folder`, is a link that leads out of it."""
    folder = Path(folder)
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not path.resolve().is_relative_to(home.resolve()):
        raise ValueError(f"{path} leads out of its folder, to {path.resolve()}: put the file itself there.")
