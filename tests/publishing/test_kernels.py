"""The kernels go to a Hub of kernel repositories in one commit, and come back by the `kernels` library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from publishing.server import TOKEN, HubServer

kernels = pytest.importorskip("kernels")
pytest.importorskip("tomllib", reason="scripts/publish_kernels.py needs Python 3.11")
from scripts import publish_kernels  # noqa: E402

ROOT = Path(__file__).parents[2]
NAME = "me/kernels"


@pytest.fixture
def hub(monkeypatch):
    server = HubServer(part_bytes=10_000).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publish_kernels, "check_tree", lambda: None)  # a tree that is worked on
    monkeypatch.setattr("hf_compress.publishing.upload.WAIT_SECONDS", 0.0)
    yield server
    server.stop()


@pytest.fixture
def publish(monkeypatch):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["publish_kernels.py", "--repo-id", NAME, *options])
        return publish_kernels.main()

    return run


LOAD = """
import torch
from hf_compress.engines import ops
assert ops.implementation().__name__.startswith("_hf_compress_kernels_cpu_"), ops.implementation().__name__
ints = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
packed = ops.wna16_pack(ints, torch.full((1, 64), 0.5), torch.full((1, 64), 8), 4, -1, torch.float32)
x = torch.randn(3, 128)
torch.testing.assert_close(ops.wna16_linear(x, packed), x @ ((ints.float() - 8) * 0.5).T)
"""


@pytest.mark.long
def test_published_kernels_load_by_name_in_a_fresh_process(hub, publish, tmp_path, capsys):
    assert publish() == 0
    assert f"{hub.url}/{NAME}/commit/" in capsys.readouterr().out
    repo = hub.repos["kernel", NAME]
    assert {name.split("/")[1] for name in repo.files("v1") if name.startswith("build/")} == {
        "torch-cpu", "torch-cuda", "torch-rocm"}  # fmt: skip
    assert hub.count("commit") == 1, "one commit: until it is there, nobody sees any of it"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_COMPRESS_KERNELS": f"{NAME}@1",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_breaks_off_does_not_load_and_the_next_try_completes(hub, publish, monkeypatch, capsys):
    monkeypatch.setattr(publish_kernels, "check_build", lambda build: None)
    monkeypatch.setattr("hf_compress.publishing.upload.ATTEMPTS", 1)
    hub.fail["commit"] = [400]
    assert publish() == 1
    assert f"Publishing {NAME} failed: it answered 400" in capsys.readouterr().err
    with pytest.raises(Exception, match="build"):
        kernels.get_kernel(NAME, version=1, trust_remote_code=[NAME])
    assert publish() == 0
    first = hub.repos["kernel", NAME].files("v1")
    assert "build/torch-cpu/metadata.json" in first


def test_a_new_build_takes_the_place_of_the_old_one(hub, publish, monkeypatch):
    monkeypatch.setattr(publish_kernels, "check_build", lambda build: None)
    assert publish() == 0
    repo = hub.repos["kernel", NAME]
    stale = {**repo.files("v1"), "build/torch-cpu/gone.py": b"", "notes.md": b"kept"}
    repo.commit("v1", stale)
    assert publish() == 0
    assert set(repo.files("v1")) == set(stale) - {"build/torch-cpu/gone.py"}


@pytest.mark.parametrize("status, code, message", [
    (401, 2, "does not know this token"), (403, 2, f"may not write to {NAME}"), (413, 1, "too large"),
])  # fmt: skip
def test_a_refusal_is_a_sentence_and_a_code(status, code, message, hub, publish, monkeypatch, capsys):
    monkeypatch.setattr(publish_kernels, "check_build", lambda build: None)
    hub.fail["create"] = [status] * 10
    assert publish() == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
