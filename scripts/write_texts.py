"""Write the texts that `hf-compress` says without loading PyTorch: the help of each verb, and the completions.

    python scripts/write_texts.py

Run it where an option, a method or a ready recipe has come, gone or changed; tests/commands/test_texts.py compares.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from hf_compress.commands.completion import SHELLS, parser_of, script  # noqa: E402
from hf_compress.commands.main import VERBS, usage  # noqa: E402
from hf_compress_cli import TEXTS  # noqa: E402


def texts() -> dict[str, str]:
    """Name -> text, for a terminal of 80 columns."""
    os.environ["COLUMNS"] = "80"
    helps = {verb: parser_of(verb).format_help() for verb in VERBS}
    return {"usage": usage(), **helps, **{f"completion.{shell}": script(shell) for shell in SHELLS}}


if __name__ == "__main__":
    TEXTS.mkdir(exist_ok=True)
    for name, text in texts().items():
        (TEXTS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(TEXTS / f"{name}.txt")
