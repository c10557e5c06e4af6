"""What the Hub answers ends in a sentence and the right code, and nothing that was made is lost."""

import json

import pytest
import yaml
from huggingface_hub import constants
from publishing.server import TOKEN, HubServer
from recipe_run import reviews, tiny_folder

import hf_compress as hfc
from hf_compress.commands.main import main


@pytest.fixture
def hub(monkeypatch):
    server = HubServer().start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("hf_compress.publishing.upload.WAIT_SECONDS", 0.0)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and its report, as another run left them."""
    folder = tiny_folder(tmp_path_factory.mktemp("made") / "model")
    quick = dict(sequence_length=8, latency_rounds=2, throughput_rounds=2)
    hfc.compare({"model": folder}, **quick).save(folder.parent / "report")
    return folder


@pytest.mark.parametrize("step, answer, code, message", [
    ("create", 401, 2, "the Hub does not know this token. Run `hf auth login`"),
    ("create", 403, 2, "this token may not write to me/small"),
    ("commit", 403, 2, "this token may not write to me/small"),
    ("commit", 409, 1, "me/small was changed by someone else at the same time"),
    ("put", 413, 1, "the Hub finds a file too large"),
    ("commit", 500, 1, "it answered 500. Nothing of this commit can be seen"),
    ("put", "cut", 1, "the connection broke off ("),
])  # fmt: skip
def test_each_answer_has_a_sentence_and_a_code(step, answer, code, message, hub, made, capsys):
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    hub.fail[step] = [answer] * 100
    command = ["publish", str(made), "--repo-id", "me/small", "--report", str(made.parent / "report")]
    assert main(command) == code
    _, *told = capsys.readouterr().err.split("hf-compress: ")
    assert len(told) == 1 and told[0].startswith(f"Publishing me/small failed: {message}") and told[0].count("\n") == 1
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before
    repo = hub.repos.get(("model", "me/small"))
    assert repo is None or repo.files("main") == {}
    hub.fail.clear()
    assert main(command) == 0 and "model.safetensors" in hub.repos["model", "me/small"].files("main")


def test_a_recipe_publishes_once_and_goes_on_after_a_failure(hub, tmp_path, capsys, caplog):
    stages = [{"quantize": {"bits": 8, "embedding_bits": 8}}, {"publish": {"repo_id": "me/recipe", "license": "mit"}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    command = ["run", str(tmp_path / "recipe.yaml"), "--model", str(tiny_folder(tmp_path / "start")), "--data",
               str(reviews(tmp_path / "r.csv")), "--max-length", "16", "--output", str(tmp_path / "out")]  # fmt: skip
    hub.fail["commit"] = [500] * 100
    assert main(command) == 1
    assert "Publishing me/recipe failed: it answered 500" in capsys.readouterr().err
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file(), "what was made is in its place"
    assert hub.repos["model", "me/recipe"].files("main") == {}
    hub.fail.clear()
    assert main(command) == 0
    assert "1/2 rtn: kept from an earlier run" in caplog.text
    files = hub.repos["model", "me/recipe"].files("main")
    assert "model.safetensors" in files and "1. quantize, rtn (`bits=8`" in files["README.md"].decode()
    record = json.loads((tmp_path / "out" / "stages.json").read_text(encoding="utf-8"))[1]
    assert record["figures"]["url"].startswith(f"{hub.url}/me/recipe/commit/")
    commits = hub.count("commit")
    assert main(command) == 0 and hub.count("commit") == commits, "what was published is not published again"
    assert main([*command, "--set", "publish.dry_run=true"]) == 0 and hub.count("commit") == commits
    assert main([*command, "--set", "publish.repo_id=me/other"]) == 0 and ("model", "me/other") in hub.repos
