"""The same recipe leaves the same bytes, whatever was kept from before; so runs can be compared byte by byte."""

import pytest
from helpers import tiny_model
from recipe_run import reviews, tiny_folder

import hf_compress as hfc
from hf_compress.recipe.data import DataOptions, RecipeData, load_tokenizer


def test_a_packed_model_is_written_alike_every_time(tmp_path):
    """safetensors writes metadata in an order of chance: two entries are the other way round half of the time."""
    model = hfc.quantize(tiny_model("bert", num_hidden_layers=1), bits=8)
    written = set()
    for number in range(8):
        model.save_pretrained(tmp_path / str(number))
        written.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_tokenizing_leaves_no_trace_in_the_tokenizer(task, tmp_path):
    """A fast tokenizer remembers where it cut, and saves it; texts that are kept from before are not cut again."""
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "model"))
    tokenizer.save_pretrained(tmp_path / "before")
    data = RecipeData(DataOptions(str(reviews(tmp_path / "r.csv")), max_length=8), task)
    rows = data.tokenized(tokenizer)
    assert max(map(len, rows["train"]["input_ids"])) <= 8
    tokenizer.save_pretrained(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name


def test_whether_there_was_a_network_is_not_saved(tmp_path):
    """Transformers keeps `local_files_only`, which it takes from HF_HUB_OFFLINE, among what describes a tokenizer."""
    load_tokenizer(tiny_folder(tmp_path / "model")).save_pretrained(tmp_path / "saved")
    assert "local_files_only" not in (tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8")
