"""Files are read as they come, and how they were read is said."""

import bz2
import gzip
import lzma

import pytest
from datasets import Dataset

from hf_compress.recipe.files import open_source
from hf_compress.recipe.texts import load_texts, open_texts

WORDS = ["café", "naïve", "plain"]
ROWS = [(f"{WORDS[i % 3]} {i}", "odd" if i % 2 else "even") for i in range(30)]


def lines(separator=",", names=("text", "label")) -> str:
    return "\n".join([separator.join(names), *(separator.join(row) for row in ROWS)]) + "\n"


def rows_of(source) -> list[tuple[str, str]]:
    splits = load_texts(str(source))
    names = splits["train"].features["label"].names
    return sorted((row["text"], names[row["label"]]) for split in splits.values() for row in split)


FORMS = {
    "plain.csv": lines().encode(),
    "CAPITALS.CSV": lines().encode(),
    "packed.csv.gz": gzip.compress(lines().encode()),
    "packed.csv.bz2": bz2.compress(lines().encode()),
    "packed.tsv.xz": lzma.compress(lines("\t").encode()),
    "tabs.tsv": lines("\t").encode(),
    "tabs.csv": lines("\t").encode(),
    "semicolons.csv": lines(";").encode(),
    "bars.csv": lines("|").encode(),
    "latin.csv": lines().encode("latin-1"),
    "latin-semicolons.csv": lines(";").encode("latin-1"),
    "mark.csv": lines().encode("utf-8-sig"),
    "wide.csv": lines().encode("utf-16"),
    "wide-without-mark.csv": lines(names=("text", "label")).encode("utf-16-le"),
    "wide-without-mark.tsv": lines("\t").encode("utf-16-be"),
    "wider.csv": lines().encode("utf-32"),
    "windows.csv": lines().replace("\n", "\r\n").encode("utf-8-sig"),
    "names.csv": lines(names=("Text", " LABEL ")).encode(),
    "lines.jsonl.gz": gzip.compress(
        "\n".join(f'{{"text": "{text}", "label": "{label}"}}' for text, label in ROWS).encode()
    ),
    "mark.jsonl": "\n".join(f'{{"text": "{text}", "label": "{label}"}}' for text, label in ROWS).encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(FORMS[name])
    assert rows_of(tmp_path / name) == sorted(ROWS)


def test_parquet_arrow_and_saved_datasets(tmp_path):
    data = Dataset.from_dict({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
    data.to_parquet(tmp_path / "all.parquet")
    data.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "all.parquet") == rows_of(tmp_path / "saved") == sorted(ROWS)


@pytest.mark.parametrize("names", [("train.tsv", "dev.tsv", "test.tsv"), ("Train.CSV", "val.csv.gz", "TEST.csv"),
    ("train-00000-of-00001.tsv", "validation-00000-of-00001.tsv", "test-00000-of-00001.tsv")])  # fmt: skip
def test_a_folder_of_splits(names, tmp_path):
    content = lines("\t").encode()
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "readme.md").write_text("not data", encoding="utf-8")
    texts = open_texts(str(tmp_path))
    assert {name: len(split) for name, split in texts.splits.items()} == {"train": 30, "validation": 30, "test": 30}
    assert "left alone: readme.md" in texts.notes


def test_a_folder_with_two_files_of_one_split_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text(lines(), encoding="utf-8")
    (tmp_path / "train.tsv").write_text(lines("\t"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"several files for train, \['train.csv', 'train.tsv'\]"):
        open_texts(str(tmp_path))


def test_how_a_file_was_read_is_said(tmp_path):
    (tmp_path / "latin.csv").write_bytes(lines(";").encode("latin-1"))
    notes = open_texts(str(tmp_path / "latin.csv")).notes
    assert notes[0] == (
        "latin.csv: 30 rows, separated by semicolons, Windows-1252 (Latin-1), with the columns text, label"
    )
    assert notes[1] == "texts from text, labels from label"
    assert notes[2:] == (
        "train: 21 rows: even 10, odd 11",
        "validation: 3 rows: even 2, odd 1",
        "test: 6 rows: even 3, odd 3",
    )


def test_fields_that_do_not_fit_are_refused_and_not_shifted(tmp_path):
    file = tmp_path / "commas.csv"
    file.write_text("text,label\n" + "".join(f"good, really {i},pos\n" for i in range(20)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"separated by commas: its lines have more fields .* \['text', 'label'\]"):
        open_texts(str(file))


def test_a_stray_quote_in_tabs_swallows_no_lines(tmp_path):
    file = tmp_path / "quotes.tsv"
    file.write_text("text\tlabel\n" + "".join(f'"{i} he said\t{"ab"[i % 2]}\n' for i in range(20)), encoding="utf-8")
    splits = load_texts(str(file))
    assert sum(map(len, splits.values())) == 20
    assert all(text.startswith('"') for text in splits["train"]["text"])


def test_quoted_fields_hold_separators_and_lines(tmp_path):
    file = tmp_path / "quoted.csv"
    rows = [f'"one, {i}\nand ""two""",{"ab"[i % 2]}\n' for i in range(20)]
    file.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    assert load_texts(str(file))["test"]["text"][0].endswith('\nand "two"')


ROW = '{"text": "fine", "label": "pos"}'
UNREADABLE = {
    "twice.csv": (b"text,label,label\nfine,pos,x\n", r"several columns called \['label'\]: rename all but one"),
    "nothing.csv": (b"", "it has no rows"),
    "nothing.jsonl": (b"", "it has no rows"),
    "nothing.txt": (b"", "it has no rows"),
    "list.json": (b"[]", "it has no rows"),
    "names.csv": (b"text,label\n", "it has no rows"),
    "plain.csv.gz": (b"text,label\nfine,pos\n", "plain.csv.gz cannot be unpacked: Not a gzipped file"),
    "torn.csv.gz": (gzip.compress(lines().encode())[:60], "torn.csv.gz cannot be unpacked"),
    "plain.jsonl.bz2": (ROW.encode(), "plain.jsonl.bz2 cannot be unpacked"),
    "plain.csv.xz": (b"text,label\nfine,pos\n", "plain.csv.xz cannot be unpacked"),
    "columns.json": (b'{"text": ["a", "b"], "label": [0, 1]}', "is one object with the keys .* so one row"),
    "under.json": (f'{{"version": "1", "data": [{ROW}, {ROW}]}}'.encode(), "is one object with the keys"),
    "frame.json": (b'{"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}}', "is one object with the keys"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_table_is_one_sentence_and_the_library_says_nothing_beside_it(name, tmp_path, caplog):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_texts(str(tmp_path / name))
    assert not caplog.records


def test_a_torn_line_of_json_is_told_once(tmp_path, caplog):
    (tmp_path / "torn.jsonl").write_text(f'{ROW}\n{{"text": "x", "la', encoding="utf-8")
    with pytest.raises(ValueError, match="torn.jsonl cannot be read as json"):
        open_texts(str(tmp_path / "torn.jsonl"))
    assert not caplog.records


def test_one_row_of_lists_is_a_row(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"tokens": ["a", "b"], "tags": ["X", "Y"]}\n', encoding="utf-8")
    assert open_source(str(tmp_path / "one.jsonl"))[0]["train"].num_rows == 1
