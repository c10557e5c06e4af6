"""A chain of sizes from one call: each stage learns from the one before, and none is run twice."""

import pytest
from transformers import TrainerCallback

from distillation.data import rows
from distillation.test_trainer import config, pair
from hf_compress.distillation.methods import assistants
from hf_compress.distillation.methods.assistants import distil_through_assistants
from hf_compress.distillation.trainer import DistillationTrainer

SIZES = [dict(num_hidden_layers=3), dict(num_hidden_layers=2, hidden_size=16)]


class Watched(DistillationTrainer):
    """Notes who taught whom, and from which step on."""

    runs: list = []  # noqa: RUF012

    def train(self, resume_from_checkpoint=None, **kwargs):
        depths = [model.config.num_hidden_layers for model in (self.teacher, self.model)]
        self.runs.append((*depths, resume_from_checkpoint and resume_from_checkpoint[-1]))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class Kill(TrainerCallback):
    """Ends stage 2 after its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("stage-2") and state.global_step == 3:
            raise KeyboardInterrupt


def chain(folder, sizes=SIZES, teacher=None, **options):
    teacher = teacher or pair()[1]
    args = config(folder, max_steps=4, save_strategy="steps", save_steps=2)
    return distil_through_assistants(teacher, sizes, args, trainer_class=Watched, train_dataset=rows(), **options)


def test_a_stopped_chain_goes_on_in_its_stage(tmp_path):
    Watched.runs = []
    whole = chain(tmp_path / "whole")
    assert Watched.runs == [(4, 3, None), (3, 2, None)] and whole.config.hidden_size == 16
    with pytest.raises(KeyboardInterrupt):
        chain(tmp_path / "stopped", callbacks=[Kill()])
    assert (tmp_path / "stopped" / "stage-1" / "final").is_dir()
    assert not (tmp_path / "stopped" / "stage-2" / "final").exists()
    Watched.runs = []
    resumed = chain(tmp_path / "stopped")
    assert Watched.runs == [(3, 2, "2")]
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert p.equal(q)
    Watched.runs = []
    again = chain(tmp_path / "stopped")
    assert Watched.runs == [] and all(p.equal(q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_student_starts_from_the_trained_assistant(tmp_path, monkeypatch):
    made, make = [], assistants.make_student

    def watched(teacher, **size):
        made.append({name: p.clone() for name, p in teacher.named_parameters()})
        return make(teacher, **size)

    monkeypatch.setattr(assistants, "make_student", watched)
    chain(tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert made[-1][name].shape == made[0][name].shape and not made[-1][name].equal(made[0][name])


def test_sizes_must_shrink_and_stay_what_they_were(tmp_path):
    student, teacher = pair()
    with pytest.raises(
        ValueError, match=r"number 2 has (\d+) parameters, the model before it \1\. Give it fewer layers"
    ):
        chain(tmp_path, [dict(num_hidden_layers=2), dict(num_hidden_layers=2)], teacher)
    with pytest.raises(ValueError, match="number 1 has .* parameters, the model before it"):
        chain(tmp_path, [teacher], student)
    with pytest.raises(ValueError, match="sizes is empty"):
        chain(tmp_path, [])
    assert not list(tmp_path.iterdir())
    chain(tmp_path, SIZES[:1], teacher)
    with pytest.raises(ValueError, match=r"holds a model with num_hidden_layers=3, but stage 1 now asks for 2"):
        chain(tmp_path, [dict(num_hidden_layers=2)], teacher)
