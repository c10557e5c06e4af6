"""Large files go up in parts; what breaks off halfway shows nothing, and the next try brings all of it."""

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from publishing.server import TOKEN, HubServer

from hf_compress.publishing.upload import HubError, upload

PART = 1000
WEIGHTS = bytes(range(256)) * 17  # 4,352 bytes: four whole parts, and one of 352


@pytest.fixture
def hub():
    server = HubServer(part_bytes=PART).start()
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


def send(folder, hub):
    return upload(folder, "me/large", token=TOKEN, endpoint=hub.url, sleep=lambda seconds: None)


def published(hub):
    return hub.repos["model", "me/large"].files("main")


def download(hub, tmp_path, name):
    options = {"endpoint": hub.url, "token": TOKEN, "cache_dir": tmp_path / "cache"}
    return hf_hub_download("me/large", name, **options)


def test_parts_are_put_together(folder, hub, tmp_path):
    send(folder, hub)
    assert published(hub)["model.safetensors"] == WEIGHTS
    assert (hub.count("part"), hub.count("complete"), hub.count("put"), hub.count("verify")) == (5, 1, 0, 1)
    assert Path(download(hub, tmp_path, "model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("step, answers", [
    ("part", [None, None, 500]), ("part", [None, "drop"]), ("part", [None, None, None, "cut"]), ("complete", [500]),
    ("complete", ["drop"]), ("verify", [500]),
], ids=lambda value: str(value).replace("None", "ok"))  # fmt: skip
def test_what_breaks_off_once_is_tried_again(step, answers, folder, hub):
    hub.fail[step] = answers
    send(folder, hub)
    assert published(hub)["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("answer", [500, "cut"])
def test_an_upload_that_dies_in_the_third_part_shows_nothing(answer, folder, hub, tmp_path):
    hub.fail["part"] = [None, None] + [answer] * 200
    with pytest.raises(HubError, match="Nothing of this commit can be seen; run the same again"):
        send(folder, hub)
    assert published(hub) == {} and hub.count("commit") == 0 and hub.count("complete") == 0
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(EntryNotFoundError):
            download(hub, tmp_path, name)
    hub.fail.clear()
    send(folder, hub)
    assert published(hub) == {"config.json": b"{}", "model.safetensors": WEIGHTS}
    assert download(hub, tmp_path, "config.json"), "that it was not there before is not remembered"


def test_a_file_that_is_not_what_its_name_says_is_not_kept(folder, hub, monkeypatch):
    """The server checks, so the tests above mean something."""
    monkeypatch.setattr("hf_compress.publishing.upload.ATTEMPTS", 1)
    original = hub.http.RequestHandlerClass.complete
    monkeypatch.setattr(hub.http.RequestHandlerClass, "complete",
                        lambda self, wanted: original(self, {**wanted, "parts": wanted["parts"][:-1]}))  # fmt: skip
    with pytest.raises(HubError, match="it answered 400"):
        send(folder, hub)
    assert published(hub) == {}
