"""A checkpoint is a folder like that of Trainer: what subclasses, callbacks and users put into it stays."""

from pathlib import Path

import pytest
from distillation.data import rows
from helpers import tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from transformers import TrainerCallback
from trust.trainers import build

from hf_compress.training.resume import UNFINISHED, begin_checkpoint, end_checkpoint, find_fault

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


class Writing(OurTrainer):
    """Writes files of its own beside those of Trainer."""

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        (self.folder(output_dir) / "mine.txt").write_text("model", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        (self.folder(output_dir) / "mine.json").write_text("{}", encoding="utf-8")

    def folder(self, output_dir):
        return Path(output_dir or self.args.output_dir)


class Note(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "note.txt").write_text("kept", encoding="utf-8")


def test_files_of_a_subclass_and_of_a_callback_are_in_the_checkpoint(tmp_path):
    trainer = Writing(tiny_model("bert"), arguments(tmp_path, **SAVES), train_dataset=rows(), callbacks=[Note()])
    trainer.train()
    for step in (2, 4):
        names = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert {"mine.txt", "mine.json", "note.txt", "model.safetensors", "trainer_state.json"} <= names
        assert UNFINISHED not in names
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("name", ["HeadPruningTrainer", "PKDTrainer", "QBertTrainer"])
def test_a_file_of_the_user_survives_a_save_of_the_same_step(name, tmp_path):
    note = tmp_path / "checkpoint-2" / "note.txt"
    for seed in (0, 1):
        build(name, tmp_path, max_steps=2, save_strategy="steps", save_steps=2, seed=seed).train()
        assert find_fault(note.parent) is None
        assert seed == 0 or note.read_text(encoding="utf-8") == "kept"
        note.write_text("kept", encoding="utf-8")


@pytest.mark.parametrize("options", [{"save_only_model": True}, {}])
def test_with_the_model_alone_or_without_a_random_state(options, tmp_path):
    trainer = build("HeadPruningTrainer", tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **options)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert find_fault(checkpoint) is None and not (checkpoint / UNFINISHED).exists()
    if options:
        return
    (checkpoint / "rng_state.pth").unlink()
    again = build("HeadPruningTrainer", tmp_path / "again", max_steps=4)
    assert again.train(resume_from_checkpoint=str(checkpoint)).global_step == 4


def test_torn_checkpoints_are_marked_and_go_with_the_next_save(tmp_path):
    for step in (2, 6):
        begin_checkpoint(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}", encoding="utf-8")
        if step == 2:
            end_checkpoint(tmp_path / "checkpoint-2")
    assert find_fault(tmp_path / "checkpoint-2") is None
    assert find_fault(tmp_path / "checkpoint-6") == "it was not written to its end"
    (tmp_path / ".discarded-checkpoint-9").mkdir()
    begin_checkpoint(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
