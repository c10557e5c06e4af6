"""A model goes to a Hub over HTTP in one commit, and comes back by its name; what breaks off shows nothing."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from publishing.server import TOKEN, HubServer
from recipe_run import tiny_folder
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.files.output import LOCK, MANIFEST
from hf_compress.publishing.hub import publish, push_to_hub
from hf_compress.publishing.upload import HubError, HubPermissionError, upload
from hf_compress.report.privacy import find_leaks
from hf_compress.report.tables import rate_word
from scripts.checks import publish as check

ROOT = Path(__file__).parents[2]
SECRET = "hf_" + "abcdefghij" * 3


@pytest.fixture
def hub():
    server = HubServer().start()
    yield server
    server.stop()


def write(folder):
    """A packed model with a tokenizer, and beside it what nobody should publish."""
    tiny_folder(folder)
    hfc.quantize(tiny_model("bert"), bits=8, embedding_bits=8).save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "notes.txt").write_text(SECRET, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    models = {"teacher": tiny_model("bert"), "small": write(tmp_path_factory.mktemp("reported") / "model")}
    return hfc.compare(models, sequence_length=8, latency_rounds=2, throughput_rounds=2, command="python train.py")


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


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
    assert SECRET.encode() not in b"".join(files.values())
    card = files["README.md"].decode()
    assert 'from_pretrained("me/small")' in card and "python train.py" in card and "x smaller, " in card


def test_the_models_own_files_go_up_byte_for_byte(folder, hub, report):
    (folder / "chat_template.jinja").write_bytes(b"{{ '</s>' }}\r\n[/INST]  ")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    send(folder, hub, report)
    files = hub.repos["model", "me/small"].files("main")
    own = before.keys() & files.keys() - {"config.json"}
    assert len(own) == 4 and all(files[name] == before[name] for name in own)
    assert files["config.json"].startswith(before["config.json"].rstrip().removesuffix(b"}").rstrip())
    without = json.loads(files["config.json"])
    del without["auto_map"]
    assert without == json.loads(before["config.json"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "and the folder stays as it was"


LEAKS = {
    "config.json": lambda folder: edit(folder / "config.json", _name_or_path="/home/me/models/teacher"),
    "generation_config.json": lambda folder: (folder / "generation_config.json").write_text(
        '{\n "note": "ask me@example.org"\n}', encoding="utf-8"
    ),
    "tokenizer_config.json": lambda folder: edit(
        folder / "tokenizer_config.json", name_or_path="C:\\\\Users\\\\me\\\\x"
    ),
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text(
        f"{{# {SECRET} #}}", encoding="utf-8"
    ),
    "model.safetensors": lambda folder: save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "from": "/data/acme/x"}
    ),
}


def edit(file, **changes):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}, indent=1), encoding="utf-8")


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_stops_everything_and_is_shown_with_file_and_line(name, folder, hub):
    LEAKS[name](folder)
    report = hfc.compare([("small", folder)], sequence_length=8, latency_rounds=1, throughput_rounds=1, command="x")
    with pytest.raises(
        ValueError, match=rf"would be published: {name}, line \d+: '.*' \((home folder|folder|mail|token)"
    ):
        send(folder, hub, report)
    assert hub.requests == []


@pytest.mark.parametrize("command", ["python /home/my folder/train.py", "train --data '/srv/acme corp/a.csv'", SECRET])
def test_a_leak_of_the_report_is_shown_and_can_be_allowed_by_name(command, folder, hub, report):
    report = dataclasses.replace(report, command=command)
    with pytest.raises(ValueError, match="line [0-9]+: '") as error:
        send(folder, hub, report)
    allow = [leak.text for leak in find_leaks(command)]
    assert all(text in str(error.value) for text in allow)
    with pytest.raises(ValueError, match="line [0-9]+: '"):
        send(folder, hub, report, allow=["/home/other"])
    assert send(folder, hub, report, allow=allow).url


def test_links_that_lead_out_of_the_folder_are_not_followed(folder, hub, report, tmp_path):
    (tmp_path / "secret.txt").write_text("mine", encoding="utf-8")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="vocab.txt leads out of its folder"):
        send(folder, hub, report)
    assert hub.requests == []


def test_a_report_of_another_model_is_refused(folder, hub, report):
    """The model was packed after it was evaluated."""
    hfc.quantize(tiny_model("bert"), bits=4).save_pretrained(folder)
    with pytest.raises(ValueError, match="The report is of teacher, small, none of which is the model in"):
        send(folder, hub, report)


def test_the_card_is_of_the_published_model_wherever_it_stands_in_the_report(folder, hub, report):
    turned = dataclasses.replace(report, entries=report.entries[::-1])
    send(folder, hub, turned)
    card = hub.repos["model", "me/small"].files("main")["README.md"].decode()
    assert f"{rate_word(report['small'].byte_rate, 'smaller', 'larger').capitalize()}, " in card


def test_a_dry_run_sends_nothing(folder, hub, report, tmp_path):
    found = send(folder, hub, report, dry_run=True, keep=tmp_path / "kept")
    assert found.url is None and hub.requests == [] and hub.repos == {}
    kept = {str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*") if p.is_file()}
    kept -= {MANIFEST, LOCK}
    assert kept == set(found.files)


def test_an_upload_that_breaks_off_shows_nothing_and_goes_on(folder, hub, report, monkeypatch):
    monkeypatch.setattr("hf_compress.publishing.upload.ATTEMPTS", 1)
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


def test_push_to_hub_takes_a_model_and_a_report_of_it(hub):
    model = tiny_model("bert", num_hidden_layers=2)
    quick = {"sequence_length": 8, "latency_rounds": 1, "throughput_rounds": 1}
    report = hfc.compare({"a": tiny_model("bert"), "b": model}, command="x", **quick)
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


def test_what_is_kept_goes_to_a_folder_of_ours_alone(folder, report, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="mine holds README.md, which hf_compress did not write"):
        publish(folder, "me/small", report=report, dry_run=True, keep=tmp_path / "mine")
    for _ in range(2):
        publish(folder, "me/small", report=report, dry_run=True, keep=tmp_path / "kept")
    assert (tmp_path / "mine" / "README.md").read_text(encoding="utf-8") == "mine"


def test_a_hub_that_says_nothing_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("hf_compress.publishing.upload.PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(HubError, match="the connection broke off .ReadTimeout."):
            upload(tmp_path, "me/small", token=TOKEN, endpoint=address)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_tokenizer_comes_back_as_it_was(name, hub, tmp_path):
    """Of two families; `scripts/checks/publish.py` does it for seven, with more texts."""
    assert check.differences(name, hub, tmp_path, 100) == []


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
    # another process: sums may be split otherwise, a few units in the last place
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)
