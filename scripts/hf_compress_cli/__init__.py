"""`hf-compress`, the command: what needs no PyTorch is said at once, all else is `hf_compress.commands.main`.

The texts are what the parsers say, kept as files: `python scripts/write_texts.py` writes them, a test compares.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"


def said_at_once(words: Sequence[str]) -> str | None:
    """The answer to a command that asks for help, the version or a completion; None for any other."""
    match list(words):
        case [] | ["-h" | "--help" | "help"]:
            name = "usage"
        case ["--version"]:
            return f"hf_compress {version()}\n"
        case ["distil", "-h" | "--help"]:
            name = "distill"
        case [verb, "-h" | "--help"]:
            name = verb
        case ["completion", shell]:
            name = f"completion.{shell}"
        case _:
            return None
    known = {path.stem: path for path in TEXTS.glob("*.txt")}  # a name that was typed is never a path
    return known[name].read_text(encoding="utf-8") if name in known else None


def version() -> str:
    """Of the package beside, which is not imported for it: that would load PyTorch."""
    (folder,) = find_spec("hf_compress").submodule_search_locations
    return runpy.run_path(str(Path(folder, "version.py")))["__version__"]


def entry_point() -> None:
    text = said_at_once(sys.argv[1:])
    if text is not None:
        sys.stdout.write(text)
        return
    from hf_compress.commands.main import entry_point as run  # seconds of imports, which a long work does not notice

    run()
