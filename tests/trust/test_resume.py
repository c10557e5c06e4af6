"""Killed and resumed is as if never killed, bit for bit: every trainer, at any moment, in the middle of a save too."""

import random
import signal

import pytest
import torch
from helpers import tiny_model
from machine import long_but, needs_fork
from pruning.test_callbacks import OurTrainer, arguments
from transformers import TrainerCallback
from trust.compositions import COMPOSITIONS
from trust.trainers import TRAINERS, assert_same, build, child, data_of, flat, run

import hf_compress as hfc
from hf_compress.distillation import METHODS as DISTILLATION
from hf_compress.pruning import METHODS as PRUNING
from hf_compress.quantization import METHODS as QUANTIZATION
from hf_compress.training.resume import UNFINISHED, find_fault, last_complete_checkpoint

CASES = (*TRAINERS, *COMPOSITIONS)
SAVES = {"save_strategy": "steps", "save_steps": 1}
NUM_KILLS = 10


def test_every_method_is_among_the_trainers():
    methods = {entry[2] for methods in (DISTILLATION, PRUNING, QUANTIZATION) for entry in methods.values()}
    assert methods <= set(TRAINERS)


def test_every_callback_is_among_the_compositions():
    kinds = {
        name for name in hfc.__all__ if isinstance(k := getattr(hfc, name), type) and issubclass(k, TrainerCallback)
    }
    assert kinds == {type(callback).__name__ for case in COMPOSITIONS.values() for callback in case.callbacks()}


@pytest.mark.parametrize("name", long_but(CASES, "DistillationTrainer", "HeadPruningTrainer", "QBertTrainer"))
def test_a_resumed_run_and_a_second_run_are_the_first_bit_for_bit(name, tmp_path):
    """Saved after step 3 of 6, taken up by a model, trainer and callbacks of other random weights."""
    whole = run(name, tmp_path, save_strategy="steps", save_steps=3)
    assert_same(run(name, tmp_path, resume=str(tmp_path / "checkpoint-3"), seed=9), whole)
    assert_same(run(name, tmp_path / "again"), whole)


def resumed(name, folder, keep):
    """A run that goes on from the last whole checkpoint, if there is one."""

    def job():
        last = last_complete_checkpoint(folder)
        result = run(name, folder, resume=last, seed=9 if last else 0, save_total_limit=2, **SAVES)
        torch.save(result, keep)

    return job


def killed_and_whole(job, folder, seed):
    """What `job(folder, file)` leaves in its file, killed at ten random moments and begun again; and never killed."""
    folders = {n: folder / n for n in ("whole", "killed")}
    jobs = {n: job(f, folder / f"{n}.pt") for n, f in folders.items()}
    for one in folders.values():
        one.mkdir()
    status, events = child(jobs["whole"], folders["whole"])
    assert status == 0 and events > 50
    rng, kills = random.Random(seed), 0
    while kills < NUM_KILLS:
        status, _ = child(jobs["killed"], folders["killed"], rng.randrange(1, events // 4))
        if status == 0:  # what was left to do was over before the kill
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills > 3
    status, _ = child(jobs["killed"], folders["killed"])
    assert status == 0
    return (torch.load(folder / f"{n}.pt", weights_only=True) for n in ("killed", "whole"))


@needs_fork
@pytest.mark.parametrize("name", long_but(CASES, "SelfDistillationTrainer"))
def test_a_run_killed_at_ten_random_moments_ends_in_the_same_bits(name, tmp_path):
    assert_same(*killed_and_whole(lambda folder, keep: resumed(name, folder, keep), tmp_path, seed=name))
    folder = tmp_path / "killed"
    assert not list(folder.glob(f"*/{UNFINISHED}")) and len(list(folder.glob("checkpoint-*"))) == 2


@needs_fork
@pytest.mark.long
def test_a_chain_of_assistants_killed_at_ten_random_moments_ends_in_the_same_bits(tmp_path):
    def job(folder, keep):
        def chain():
            args = hfc.DistillationConfig(str(folder), use_cpu=True, max_steps=4, report_to="none", disable_tqdm=True,
                                          save_total_limit=2, per_device_train_batch_size=4, **SAVES)  # fmt: skip
            sizes = [{"num_hidden_layers": 3}, {"num_hidden_layers": 2}]
            data = data_of("DistillationTrainer")
            student = hfc.distil_through_assistants(tiny_model("bert", seed=3), sizes, args, train_dataset=data)
            torch.save((flat(student.state_dict()), []), keep)

        return chain

    assert_same(*killed_and_whole(job, tmp_path, seed="assistants"))


@needs_fork
def test_a_kill_anywhere_in_a_save_leaves_the_last_checkpoint_or_the_new_one(tmp_path):
    """At each third event of two saves: what is found afterwards is whole, and of the last step or the one before."""
    _, events = child(lambda: run("LayerPruningTrainer", tmp_path / "all", max_steps=2, **SAVES), tmp_path / "all")
    found = set()
    for kill_at in range(2, events, max(1, events // 6)):
        folder = tmp_path / str(kill_at)
        status, _ = child(lambda f=folder: run("LayerPruningTrainer", f, max_steps=2, **SAVES), folder, kill_at)
        assert status == -signal.SIGKILL
        last = last_complete_checkpoint(folder)
        found.add(last and last.rpartition("-")[2])
        for checkpoint in (c for c in folder.glob("checkpoint-*") if find_fault(c) is None):
            trainer = build("LayerPruningTrainer", tmp_path / "other", max_steps=2)
            trainer._load_from_checkpoint(str(checkpoint))
    assert {None, "1"} <= found <= {None, "1", "2"}


def test_a_torn_checkpoint_that_is_named_is_refused(tmp_path):
    trainer = build("HeadPruningTrainer", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="valid checkpoint at .*checkpoint-2: optimizer.pt is cut short"):
        build("HeadPruningTrainer", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        build("HeadPruningTrainer", tmp_path).train(resume_from_checkpoint=True)


def test_quantization_aware_training_resumes_in_any_trainer(tmp_path):
    """Grids, running ranges and bits are those of the run that was not stopped."""

    def train(resume=None, seed=0):
        model = hfc.prepare_qat(build("HeadPruningTrainer", tmp_path, seed=seed).model, 2)
        callbacks = [hfc.QuantizationAware(refresh_steps=2, start_bits=8, lowering_ratio=0.8)]
        args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = OurTrainer(model, args, train_dataset=data_of("OurTrainer"), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        state = trainer.training_state.state_dict()
        return {**model.state_dict(), **{f"state.{n}": t.clone() for n, t in state.items()}}

    whole, again = train(), train(str(tmp_path / "checkpoint-3"), seed=9)
    assert any("weight_grid" in name for name in whole)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
