"""A model goes to a Hub over HTTP in one commit, and comes back by its name; what breaks off shows nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from hub.server import TOKEN, HubServer
from recipe_run import tiny_folder

import hf_compress as hfc
from hf_compress.publishing.hub import HubError, HubPermissionError, publish, push_to_hub, stage_folder, upload
from hf_compress.report.privacy import secrets_in, without_secrets

ROOT = Path(__file__).parents[2]
SECRET = "hf_" + "abcdefghij" * 3


@pytest.fixture
def hub():
    server = HubServer().start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def report():
    teacher, student = tiny_model("bert"), tiny_model("bert", num_hidden_layers=2)
    return hfc.compare({"teacher": teacher, "student": student}, sequence_length=8, latency_rounds=2,
                       throughput_rounds=2, command="python /home/me/train.py")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A packed model with a tokenizer, and beside it what nobody should publish."""
    folder = tiny_folder(tmp_path / "model")
    model = hfc.quantize(tiny_model("bert"), bits=8, embedding_bits=8)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "_name_or_path": "/home/me/models/teacher"}), encoding="utf-8"
    )
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "notes.txt").write_text(SECRET, encoding="utf-8")
    return folder


def send(folder, hub, report, **options):
    return publish(folder, "me/small", report=report, token=TOKEN, endpoint=hub.url, **options)


def test_what_is_published_is_all_that_is_needed_and_no_more(folder, hub, report):
    found = send(folder, hub, report)
    repo = hub.repos["model", "me/small"]
    files = repo.files("main")
    assert repo.private and set(files) == set(found.files)
    assert set(files) == {
        "README.md", "config.json", "model.safetensors", "modeling_hf_compress.py", "tokenizer.json",
        "tokenizer_config.json", "report/report.json", "report/report.md", "report/report.csv", "report/report.html",
    }  # fmt: skip
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForSequenceClassification"]
    everything = b"".join(data for name, data in files.items() if name != "model.safetensors")
    assert b"/home/me" not in everything and SECRET.encode() not in everything
    card = files["README.md"].decode()
    assert 'from_pretrained("me/small")' in card and "python train.py" in card


def test_a_dry_run_sends_nothing(folder, hub, report, tmp_path):
    found = send(folder, hub, report, dry_run=True, keep=tmp_path / "kept")
    assert found.url is None and hub.requests == [] and hub.repos == {}
    kept = {str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*") if p.is_file()}
    assert kept == set(found.files)


def test_an_upload_that_breaks_off_shows_nothing_and_goes_on(folder, hub, report, monkeypatch):
    monkeypatch.setattr("hf_compress.publishing.hub.ATTEMPTS", 1)
    hub.fail["commit"] = [500] * 10
    with pytest.raises(HubError, match="it answered 500. Nothing of this commit can be seen"):
        send(folder, hub, report)
    assert hub.repos["model", "me/small"].files("main") == {}, "weights were sent, but no commit shows them"
    assert len(hub.blobs) == 1 and hub.count("put") == 1
    hub.fail.clear()
    send(folder, hub, report)
    assert "model.safetensors" in hub.repos["model", "me/small"].files("main")
    assert hub.count("put") == 1, "what was there was not sent again"


@pytest.mark.parametrize("step, answers", [
    ("commit", [500, 503]), ("put", [500]), ("put", ["drop"]), ("preupload", [502]), ("lfs", [500]), ("commit", [409]),
])  # fmt: skip
def test_what_may_pass_is_tried_again(step, answers, hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 100)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    hub.fail[step] = answers
    upload(tmp_path, "me/small", token=TOKEN, endpoint=hub.url, sleep=lambda seconds: None)
    assert set(hub.repos["model", "me/small"].files("main")) == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("step, status, kind, message", [
    ("create", 401, HubPermissionError, "does not know this token"),
    ("create", 403, HubPermissionError, "may not write to me/small"),
    ("put", 413, HubError, "too large"),
    ("commit", 413, HubError, "too large"),
    ("commit", 409, HubError, "changed by someone else"),
])  # fmt: skip
def test_what_the_hub_refuses_is_said(step, status, kind, message, hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hub.fail[step] = [status] * 50
    with pytest.raises(kind, match=message):
        upload(tmp_path, "me/small", token=TOKEN, endpoint=hub.url, sleep=lambda seconds: None)
    repo = hub.repos.get(("model", "me/small"))
    assert repo is None or repo.files("main") == {}


def test_a_wrong_token_and_a_hub_that_is_not_there(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(HubPermissionError, match="does not know this token"):
        upload(tmp_path, "me/small", token="wrong", endpoint=hub.url)
    with pytest.raises(HubError, match="the connection broke off .ConnectError."):
        upload(tmp_path, "me/small", token=TOKEN, endpoint="http://127.0.0.1:9", sleep=lambda seconds: None)
    with pytest.raises(ValueError, match="must begin with https://, got 'hub.example'"):
        upload(tmp_path, "me/small", token=TOKEN, endpoint="hub.example")


def test_push_to_hub_takes_a_model(hub, report):
    model = tiny_model("bert", num_hidden_layers=2)
    push_to_hub(model, "me/pushed", report=report, token=TOKEN, endpoint=hub.url, private=False)
    repo = hub.repos["model", "me/pushed"]
    assert not repo.private and "modeling_hf_compress.py" not in repo.files("main"), "an ordinary model needs no code"


def test_bad_folders_and_names_are_refused(tmp_path, folder, report):
    with pytest.raises(ValueError, match="holds no model"):
        publish(tmp_path, "me/small")
    with pytest.raises(ValueError, match="repo_id must be a name on the Hub"):
        publish(folder, "/home/me/small")
    with pytest.raises(ValueError, match="There is no report at"):
        publish(folder, "me/small", report=tmp_path / "nothing")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "chat_template.jinja").write_text(f"{{# {SECRET} #}}", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="chat_template.jinja holds what should stay private"):
        publish(folder, "me/small", report=report, dry_run=True)


def test_staging_leaves_the_folder_as_it_was(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    stage_folder(folder, tmp_path / "staged")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_secrets_are_what_would_be_taken_out():
    for text in (SECRET, "see /home/me/x.py", r"C:\Users\me", "run --token abc"):
        assert secrets_in(text) and secrets_in(without_secrets(text)) == []
    assert secrets_in("https://example.org/a/b and 3/4 and a/b") == []


PUBLISH = """
import sys
from hf_compress.commands.main import main
sys.exit(main(["publish", sys.argv[1], "--repo-id", "me/by-name", "--public", "--report", sys.argv[2]]))
"""
LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("me/by-name", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/by-name")
torch.save(model(**tokenizer("the film was good", return_tensors="pt")).logits.detach(), sys.argv[1])
"""


def test_by_name_in_a_fresh_process(folder, hub, report, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
                   "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    printed = run(PUBLISH, folder, report.save(tmp_path / "report"))
    assert "model.safetensors" in printed and f"{hub.url}/me/by-name/commit/" in printed
    run(LOAD, tmp_path / "logits.pt")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = model(**tokenizer("the film was good", return_tensors="pt")).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
