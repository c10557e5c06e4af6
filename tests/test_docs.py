"""What the documents tell a reader to type works: marked snippets run, recipes and command lines are understood."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from recipe_run import TRAIN, reviews, tiny_folder
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, default_data_collator

from hf_compress.commands.completion import STAGES, parser_of
from hf_compress.commands.main import VERBS, main
from hf_compress.commands.parser import EXAMPLES
from hf_compress.recipe import Recipe
from hf_compress.recipe.options import read_yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MARK = "# runs in the tests"


def blocks(language):
    """(page, text) of each block of code in `language`."""
    return [
        (page, text)
        for page in PAGES
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    ]


SNIPPETS = [(page, text) for page, text in blocks("python") if text.startswith(MARK)]
RECIPES = [(page, text) for page, text in blocks("yaml") if "stages:" in text]
IN_HELP = [(Path("help"), f"hf-compress {example}") for example in EXAMPLES.values()]
COMMANDS = IN_HELP + [
    (page, line) for page, text in blocks("bash") for line in text.splitlines() if line.startswith("hf-compress")
]


def named(cases):
    return [f"{page.name}-{i}" for i, (page, _) in enumerate(cases)]


@pytest.mark.parametrize("page, code", SNIPPETS, ids=named(SNIPPETS))
def test_a_marked_snippet_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if 'format="openvino"' in code:
        pytest.importorskip("openvino")
    rows = [{"input_ids": torch.randint(5, 60, (12,)).tolist(), "attention_mask": [1] * 12} for _ in range(8)]
    labelled = [{**row, "labels": i % 2} for i, row in enumerate(rows)]
    folder = tiny_folder(tmp_path / "model")
    texts = str(reviews(tmp_path / "reviews.csv"))
    tools = {
        "model": tiny_model("bert", num_labels=2), "teacher": tiny_model("bert", num_labels=2, seed=1), "rows": rows,
        "train_set": labelled, "test_set": labelled, "csv_file": texts, "model_folder": str(folder),
        "tokenizer": BertTokenizerFast.from_pretrained(folder),
        "dataloader": DataLoader(labelled, 4, collate_fn=default_data_collator),
    }  # fmt: skip
    exec(code, tools)


@pytest.mark.parametrize("page, text", RECIPES, ids=named(RECIPES))
def test_a_recipe_in_a_document_is_one(page, text):
    written = read_yaml(text, page.name)
    assert Recipe(written.pop("stages"), **written).stages


@pytest.mark.parametrize("page, line", COMMANDS, ids=named(COMMANDS))
def test_a_command_in_a_document_is_understood(page, line):
    _, verb, *words = shlex.split(re.split(r" [#>] ?", line)[0])
    if {"--help", "--version"} & {verb, *words}:
        assert main([verb, *words]) == 0
        return
    verb = {"distil": "distill"}.get(verb, verb)
    method = words[words.index("--method") + 1] if verb in STAGES and "--method" in words else None
    assert parser_of(verb, method).parse_all(words)


def test_every_example_of_the_readme_runs():
    shown = [text for page, text in blocks("python") if page.name == "README.md" and page.parent == ROOT]
    assert len(shown) >= 5 and all(text.startswith(MARK) for text in shown)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_ends_with_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.endswith(f"Example:\n  hf-compress {EXAMPLES[verb]}\n")
    assert EXAMPLES[verb].startswith(verb)


def test_there_is_something_to_test():
    assert len(SNIPPETS) >= 8 and RECIPES and len(COMMANDS) >= 8 and TRAIN
