"""A model may have any name: no report is lost by it, and no spreadsheet computes it."""

import csv
import io
import json

import pytest
from helpers import tiny_model
from transformers import default_data_collator

import hf_compress as hfc

NAMES = [
    "$a",
    "$a_b$ and $x^{$",
    "=1+1",
    "@sum(a1)",
    "-2",
    "a|b",
    "two\nlines",
    "<b>&amp;",
    "`x`",
    "größer 東京",
    "a,b\"c'",
]


@pytest.fixture(scope="module")
def report():
    rows = [{"input_ids": [5 + i % 7, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    quick = {"sequence_length": 8, "latency_rounds": 1, "throughput_rounds": 1, "data_collator": default_data_collator}
    model = tiny_model("bert")
    return hfc.compare([(name, model) for name in NAMES], eval_dataset=rows, command="x", **quick)


def test_all_files_of_a_report_are_made(report):
    files = report.files()
    assert {"report.json", "report.md", "report.csv", "report.html", "report.png"} == set(files)
    assert [entry["name"] for entry in json.loads(files["report.json"])["entries"]] == NAMES
    table = files["report.md"].decode().partition("\n\n")[0].splitlines()
    assert len(table) == len(NAMES) + 2 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert b"<b>&amp;" not in files["report.html"]


def test_no_cell_of_the_table_is_a_formula(report):
    for row in csv.DictReader(io.StringIO(report.files()["report.csv"].decode())):
        for value in row.values():
            is_number = value.lstrip("-").replace(".", "").replace("e-", "").isdigit()
            assert value[:1] not in tuple("=+@\t\r") and (value[:1] != "-" or is_number)
    assert {row["model"] for row in csv.DictReader(io.StringIO(report.to_csv()))} > {"'=1+1", "'@sum(a1)", "'-2", "$a"}
