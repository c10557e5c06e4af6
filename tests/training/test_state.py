"""TrainingState: seen by the optimiser, absent from every save; trust/ resumes it, and trains it on two processes."""

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file
from torch import nn
from trust.trainers import build

from hf_compress.training.resume import find_fault, last_complete_checkpoint
from hf_compress.training.state import STATE_FILE, TrainingState, attached


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
    build("HeadPruningTrainer", tmp_path, save_strategy="steps", save_steps=3).train()
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {STATE_FILE}, which this trainer needs to resume"):
        build("HeadPruningTrainer", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
