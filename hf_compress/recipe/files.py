"""Opens examples as people keep them: CSV with any separator, JSON, parquet, text, packed or not, or folders of these.

What is in a file is not guessed silently: how it was read (separator, encoding, rows) is told beside what was read. In
CSV every field is a text, and nothing but an empty one is missing: `None`, `NA` and `null` are words.
"""

import codecs
import csv
import logging
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset, load_from_disk

KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
         ".arrow": "arrow", ".txt": "text"}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
ENCODINGS = {"utf-8-sig": "UTF-8", "utf-16": "UTF-16", "utf-16-le": "UTF-16 without a mark",
             "utf-16-be": "UTF-16 without a mark", "utf-32": "UTF-32", "cp1252": "Windows-1252 (Latin-1)",
             "latin-1": "Latin-1"}  # fmt: skip
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # the longer first: that of UTF-32 begins as the other does
OF_NO_ROWS = ("corresponds to no data", "at least one example")  # what datasets says of an empty file
ROWS_UNDER = ("data", "rows", "examples", "items", "records", "train", "validation", "test")
TABLE_TEXTS = ("text", "sentence", "content", "review", "document", "question", "source", "premise", "query")
PIECE = 1 << 20  # bytes decoded at one time
LOOKED_AT = 100  # rows of a CSV file that show whether they fit its first line


def open_source(source: str) -> tuple[DatasetDict, list[str]]:
    """The splits of a file, a folder or a dataset of the Hub, and how they were read. Raises ValueError, saying why."""
    path = Path(source)
    if path.is_file():
        data, how = _read(path, source)
        return DatasetDict(train=data), [how]
    if path.is_dir():
        return _open_folder(path)
    try:
        splits = load_dataset(source)
    except Exception as error:  # of many kinds: no network, no such name, no permission
        raise ValueError(
            f"{source!r} is no file or folder, and opening it as a dataset of the Hub failed: {error}"
        ) from error
    return splits, [f"{source}, of the Hub: {_sizes(splits)}"]


def split_called(name: str) -> str | None:
    """`validation` for "val", "dev", ...; None for a name that is no usual one of a split."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _open_folder(folder: Path) -> tuple[DatasetDict, list[str]]:
    if (folder / "dataset_dict.json").is_file():
        splits = DatasetDict.load_from_disk(str(folder))
        return splits, [f"{folder.name}: {_sizes(splits)}"]
    if (folder / "state.json").is_file():
        data = load_from_disk(str(folder))
        return DatasetDict(train=data), [f"{folder.name}: {len(data)} rows"]
    found: dict[str, list[Path]] = {}
    others = []
    for file in sorted(folder.iterdir()):
        named = re.fullmatch(r"([a-z]+)(-\d+-of-\d+)?", file.name.lower().partition(".")[0])  # train-00000-of-00001
        split = split_called(named[1]) if named and _kind(file) else None
        found.setdefault(split, []).append(file) if split and file.is_file() else others.append(file.name)
    if not found and (folder / "data").is_dir():
        return _open_folder(folder / "data")
    if "train" not in found:
        raise ValueError(f"{folder} has no train.csv or train.json: it has {sorted(p.name for p in folder.iterdir())}.")
    splits, told = DatasetDict(), []
    for split, files in found.items():
        if len(files) > 1 and not all("-of-" in file.name for file in files):
            raise ValueError(f"{folder} has several files for {split}, {[f.name for f in files]}: leave one of them.")
        parts = [_read(file, str(file)) for file in files]
        splits[split] = concatenate_datasets([data for data, _ in parts])
        told += [how for _, how in parts]
    return splits, told + ([f"left alone: {', '.join(others)}"] if others else [])


def _sizes(splits: DatasetDict) -> str:
    return ", ".join(f"{name} {len(data)} rows" for name, data in splits.items())


def _kind(file: Path) -> str | None:
    endings = [ending.lower() for ending in file.suffixes]
    if endings and endings[-1] in PACKED:
        endings.pop()
    return KINDS.get(endings[-1]) if endings else None


def _read(file: Path, source: str) -> tuple[Dataset, str]:
    """The rows of one file, and how they were read."""
    kind, options, how = _kind(file), {}, ""
    if kind is None:
        raise ValueError(
            f"{source} must be a CSV, TSV, JSON or text file, got {file.suffix or 'no ending'}. Read are the endings "
            f"{', '.join(KINDS)}, each also packed ({', '.join(PACKED)})."
        )
    with _packing_told(source):
        if kind in ("csv", "json", "text"):
            options["encoding"] = _encoding(file)
            how = f", {ENCODINGS[options['encoding']]}"
        if kind == "csv":
            options |= _csv_options(file, options["encoding"], source)
            how = f", separated by {SEPARATORS[options['sep']]}{how}"
    library = logging.getLogger("datasets")
    level = library.level
    library.setLevel(logging.CRITICAL)  # it tells what it raises as well
    try:
        data = load_dataset(kind, data_files=str(file), split="train", **options)
    except Exception as error:  # of many kinds: nothing in it, lines of different lengths
        reason = str(error.__cause__ or error).partition("\n")[0]
        reason = "it has no rows" if not reason or any(words in reason for words in OF_NO_ROWS) else reason
        raise ValueError(f"{source} cannot be read as {kind}, with at least one example{how}: {reason}") from error
    finally:
        library.setLevel(level)
    if kind == "json" and len(data) == 1 and _is_table(data):
        raise ValueError(
            f"{source} is one object with the keys {data.column_names}, so one row. Write a list of rows, or a row in "
            'each line, such as {"text": ..., "label": ...}; pandas does by to_json(orient="records", lines=True).'
        )
    return data, f"{file.name}: {len(data)} rows{how}, with the columns {', '.join(data.column_names)}"


@contextmanager
def _packing_told(source: str) -> Iterator[None]:
    """A file that is not packed as its ending says, or torn, as a sentence."""
    try:
        yield
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise ValueError(f"{source} cannot be unpacked: {error}. Pack it again, or give it as it is.") from error


def _is_table(row: Dataset) -> bool:
    """Whether the one row of a JSON file is a whole table: by columns, or as rows under a key such as `data`."""
    lists = [name for name, kind in row.features.items() if isinstance(kind, List)]
    if any(name.lower() in ROWS_UNDER and isinstance(row.features[name].feature, dict) for name in lists):
        return True
    if all(isinstance(kind, dict) and all(key.isdigit() for key in kind) for kind in row.features.values()):
        return True  # pandas.DataFrame.to_json
    are_texts = any(row.features[name].feature == Value("string") for name in lists if name.lower() in TABLE_TEXTS)
    return are_texts and len(lists) == len(row.features)


def _encoding(file: Path) -> str:
    """What all bytes of a file can be read with: UTF-8, UTF-16, each with or without a mark, else Windows-1252."""
    with fsspec.open(str(file), compression="infer") as stream:
        start = stream.read(4)
    if marked := next((name for mark, name in MARKS.items() if start.startswith(mark)), None):
        return marked
    if len(start) == 4 and start.count(0) == 2 and (start[0::2] == b"\0\0" or start[1::2] == b"\0\0"):
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    for encoding in ("utf-8", "cp1252"):
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            with fsspec.open(str(file), compression="infer") as stream:
                while piece := stream.read(PIECE):
                    decoder.decode(piece)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            continue
        return "utf-8-sig" if encoding == "utf-8" else encoding
    return "latin-1"


def _csv_options(file: Path, encoding: str, source: str) -> dict[str, Any]:
    """How `file` separates and quotes its fields, all of them texts. Raises ValueError for lines that do not fit."""
    import pandas  # comes with datasets; slow to import

    with fsspec.open(str(file), "rt", encoding=encoding, compression="infer", newline="") as lines:
        first = next((line for line in lines if line.strip()), "")
        try:
            names = {sep: next(csv.reader([first], delimiter=sep), []) for sep in SEPARATORS}
        except csv.Error as error:
            raise ValueError(f"The first line of {source} must name its columns: {error}.") from error
        sep = max(names, key=lambda sep: len(names[sep]))
        quoting = csv.QUOTE_NONE if sep == "\t" and _has_stray_quotes(chain([first], lines)) else csv.QUOTE_MINIMAL
    if twice := sorted({name for name in names[sep] if name.strip() and names[sep].count(name) > 1}):
        raise ValueError(f"{source} has several columns called {twice}: rename all but one of each.")
    options = {"sep": sep, "quoting": quoting, "na_filter": False}
    try:
        top = pandas.read_csv(file, encoding=encoding, dtype=str, nrows=LOOKED_AT, **options)
    except ValueError as error:  # pandas' ParserError and EmptyDataError are
        raise ValueError(
            f"{source} cannot be read as csv, with at least one example, separated by {SEPARATORS[sep]}: "
            + (str(error) if first else "it has no rows")
        ) from error
    if len(top) and not isinstance(top.index, pandas.RangeIndex):  # pandas takes what is too much for names of the rows
        raise ValueError(
            f"{source}, separated by {SEPARATORS[sep]}: its lines have more fields than its first line has names "
            f"{list(top.columns)}. Put texts that hold {sep!r} in quotes."
        )
    return {**options, "features": Features({name: Value("string") for name in top.columns})}


def _has_stray_quotes(lines: Iterable[str]) -> bool:
    """Whether a quote begins a field and does not end it: a character then, which would swallow lines as a quote."""
    fields = (field for line in lines for field in line.rstrip("\r\n").split("\t"))
    return any(f.startswith('"') and not (len(f) > 1 and f.endswith('"')) for f in fields)
