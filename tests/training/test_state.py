"""TrainingState: seen by the optimiser, absent from every save, resumed exactly, the same on two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from machine import needs_fork
from safetensors.torch import load_file
from torch import nn

from hf_compress.training.resume import find_fault, last_complete_checkpoint
from hf_compress.training.state import STATE_FILE, TrainingState, attached

SCRIPT = str(Path(__file__).parents[1] / "training_run.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(output, method, *options, launcher=(), check=True):
    output.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, SCRIPT, str(output), method, *options]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=check)


def final(folder):
    return load_file(folder / "final.safetensors")


def losses(folder):
    return [entry for entry in json.loads((folder / "log.json").read_text(encoding="utf-8")) if "loss" in entry]


def test_attached_state_is_trained_and_never_saved(tmp_path):
    model, state = tiny_model("bert"), TrainingState()
    state.add("projection", nn.Linear(32, 16, bias=False))
    state.add("mask", torch.ones(4))
    before = set(model.state_dict())
    with attached(state, model):
        assert any("projection" in name for name, _ in model.named_parameters())
        assert set(model.state_dict()) == before
        model.save_pretrained(tmp_path)
        assert model.load_state_dict(model.state_dict(), strict=False).missing_keys == []
        missing = model.load_state_dict({}, strict=False).missing_keys
        assert missing and not any("projection" in name for name in missing)
    assert set(load_file(tmp_path / "model.safetensors")) == before
    assert not any("projection" in name for name, _ in model.named_parameters())
    assert set(state.state_dict()) == {"projection.weight", "mask"}


@needs_fork
@pytest.mark.parametrize("method", ["soft-targets", "tinybert"])
def test_a_killed_run_resumes_to_the_same_bits(method, tmp_path):
    """Killed after step 5, and again in the middle of saving step 6: weights, projections and logs are as if never."""
    run(tmp_path / "whole", method)
    killed = run(tmp_path / "killed", method, "--save-steps", "2", "--kill-at", "5", check=False)
    assert killed.returncode == -signal.SIGKILL
    torn = run(tmp_path / "killed", method, "--save-steps", "2", "--resume", "--kill-at", "6", "--in-save", check=False)
    assert torn.returncode == -signal.SIGKILL
    assert find_fault(tmp_path / "killed" / "checkpoint-6") == "it was not written to its end"
    resumed = run(tmp_path / "killed", method, "--save-steps", "2", "--resume")
    assert "Passing over" in resumed.stderr and "checkpoint-6" in resumed.stderr
    whole, again = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert whole.keys() == again.keys() and any(name.startswith("state.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    for mine, theirs in zip(losses(tmp_path / "whole"), losses(tmp_path / "killed"), strict=True):
        assert mine == theirs


@pytest.mark.parametrize("method", ["soft-targets", "tinybert"])
def test_two_processes_follow_the_trajectory_of_one(method, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")
    run(tmp_path / "one", method, "--no-dropout", "--batch-size", "8")
    run(tmp_path / "two", method, "--no-dropout", "--batch-size", "4", launcher=launcher)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    for mine, theirs in zip(one, two, strict=True):
        for name in [n for n in mine if n.endswith("loss")]:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name
    for name, tensor in final(tmp_path / "one").items():
        torch.testing.assert_close(final(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4)


def test_checkpoints_that_were_torn_are_named(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path / "none") is None
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        tiny_model("bert").save_pretrained(folder)
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-10")
    file = tmp_path / "checkpoint-10" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level("WARNING"):
        assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    assert "checkpoint-10" in caplog.text and "where its header says" in caplog.text
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"PK half")
    assert find_fault(tmp_path / "checkpoint-2") == "optimizer.pt is cut short at 7 bytes"
    torch.save({}, tmp_path / "checkpoint-2" / "optimizer.pt")
    assert find_fault(tmp_path / "checkpoint-2") is None  # as for Trainer, where it is named
    assert last_complete_checkpoint(tmp_path) is None and "rng_state.pth is missing" in caplog.text
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    index = tmp_path / "checkpoint-2" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}', encoding="utf-8")
    assert find_fault(tmp_path / "checkpoint-2").endswith("named by model.safetensors.index.json, is missing")
    index.unlink()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"cut', encoding="utf-8")
    assert last_complete_checkpoint(tmp_path) is None


def test_resuming_without_the_training_state_is_refused(tmp_path):
    run(tmp_path / "run", "tinybert", "--save-steps", "4")
    (tmp_path / "run" / "checkpoint-8" / STATE_FILE).unlink()
    result = run(tmp_path / "run", "tinybert", "--resume", "--steps", "12", check=False)
    assert result.returncode != 0 and f"has no {STATE_FILE}, which this trainer needs to resume" in result.stderr
