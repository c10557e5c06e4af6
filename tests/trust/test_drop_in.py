"""What users of `Trainer` rely on, for every trainer of the project: they are Trainers, so all of it works."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from machine import long_but
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from trust.trainers import CAUSAL, TRAINERS, build, data_of, prepared, run

import hf_compress as hfc
from hf_compress.distillation.students import make_student
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.pruning.trainer import PruningTrainer

QUICK = ("PKDTrainer", "BlockPruningTrainer", "QBertTrainer")
LONG = long_but(TRAINERS, *QUICK)
LABELLED = [p for p in LONG if p.values[0] != "MarginMSETrainer"]  # Trainer computes metrics of labels alone
# They draw anew in each forward, watch the range of each, or compare examples that are in a batch together.
CUT_DEPENDENT = {"EmbeddingDistillationTrainer", "HeadGatesTrainer", "LayerPruningTrainer", "QBertTrainer",
                 "RankGatesTrainer", "RelationalTrainer", "TheseusTrainer"}  # fmt: skip
# All that can learn from a teacher alone: there are labels behind the others' losses, whatever alpha is.
DISTILLING = {n for n in TRAINERS if issubclass(getattr(hfc, n), DistillationTrainer)} - {
    "MarginMSETrainer", "SelfDistillationTrainer", "TheseusTrainer"  # the first has no labels to take away
}  # fmt: skip
ACCUMULATING = [p for p in LONG if p.values[0] not in CUT_DEPENDENT]


# The step after which the last phase has been trained, the schedule or the lowering of bits is through; else the first.
COMPLETE = {"BlockPruningTrainer": 5, "HeadGatesTrainer": 4, "HeadPruningTrainer": 5, "MiniLMTrainer": 4,
            "NeuronPruningTrainer": 5, "QBertTrainer": 2, "RankGatesTrainer": 4, "TheseusTrainer": 4,
            "TinyBertTrainer": 4, "WeightPruningTrainer": 5}  # fmt: skip


class Events(TrainerCallback):
    def __init__(self):
        self.seen: dict[str, int] = {}

    def note(self, name: str) -> None:
        self.seen[name] = self.seen.get(name, 0) + 1

    def on_step_end(self, *args, **kwargs):
        self.note("step")

    def on_save(self, *args, **kwargs):
        self.note("save")

    def on_evaluate(self, *args, metrics, **kwargs):
        assert "eval_loss" in metrics
        self.note("evaluate")


@pytest.mark.parametrize("name", LABELLED)
def test_rotation_best_model_early_stopping_own_optimiser_and_prediction(name, tmp_path):
    """Scores fall after the second step; a patience of two ends the training two steps after the best that counts."""
    values, events = [0.1, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], Events()
    scores, first = iter(values), COMPLETE.get(name, 1)
    best = max(range(first, 7), key=lambda step: values[step - 1])
    last = min(best + 2, 6)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = build(
        name, tmp_path, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="score",
        gradient_accumulation_steps=2, per_device_train_batch_size=2, **steps,
        extra={"callbacks": [EarlyStoppingCallback(2), events], "compute_metrics": lambda _: {"score": next(scores)},
               "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})},
    )  # fmt: skip
    trainer.train()
    assert events.seen == {"step": last, "save": last, "evaluate": last}
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {f"checkpoint-{best}", f"checkpoint-{last}"}
    if not isinstance(trainer, PruningTrainer):  # those have cut the best model by now
        stored = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
        assert all(torch.equal(t, stored[n]) for n, t in trainer.model.state_dict().items() if n in stored)
    output = trainer.predict(data_of(name, 5, seed=2))
    assert len(output.label_ids) == 5 and output.metrics["test_score"] == 0.1


@pytest.mark.parametrize("name", ACCUMULATING)
def test_gradient_accumulation_trains_as_the_whole_batch(name, tmp_path):
    options = {"dropout": 0.0, "max_steps": 3, "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}
    if name == "DistillationTrainer":
        options["teacher_noise"] = 0.0
    whole, _ = run(name, tmp_path, per_device_train_batch_size=8, **options)
    cut, _ = run(name, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert whole.keys() == cut.keys()
    for key, tensor in whole.items():
        if key.startswith((".model", ".state")):
            torch.testing.assert_close(cut[key], tensor, rtol=1e-4, atol=1e-6, msg=key)


def test_gradient_accumulation_without_labels_trains_as_the_whole_batch(tmp_path):
    """`Trainer` counts labels to know whether a loss is divided already."""
    data = data_of("DistillationTrainer").remove_columns("labels")
    options = {"dropout": 0.0, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-1, "alpha": 1.0,
               "teacher_noise": 0.0, "extra": {"train_dataset": data}}  # fmt: skip
    whole, _ = run("DistillationTrainer", tmp_path, per_device_train_batch_size=8, **options)
    cut, _ = run(
        "DistillationTrainer", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    start = build("DistillationTrainer", tmp_path).model.state_dict()
    moved = sum((whole[f"end.{key}"] - tensor).norm() for key, tensor in start.items())
    apart = sum((whole[f"end.{key}"] - cut[f"end.{key}"]).norm() for key in start)
    assert moved > 0 and apart < 1e-3 * moved


@pytest.mark.parametrize("name", LONG)
def test_iterable_datasets_are_trained_on_for_max_steps(name, tmp_path):
    data = data_of(name, 8).to_iterable_dataset()
    trainer = build(name, tmp_path, max_steps=3, extra={"train_dataset": data})
    assert trainer.train().global_step == 3
    assert sum("loss" in entry for entry in trainer.state.log_history) == 3


# What a trial changes, so that nothing of it is passed over, beside a setting that every trial has alike.
SEARCHED = {
    "HeadPruningTrainer": ("sparsity", 0.2),
    "QBertTrainer": ("average_bits", 8.0),
    "DistillationTrainer": ("hints", "1:1"),
    "SelfDistillationTrainer": ("hint_weight", 0.0),
    "MutualTrainer": ("alpha", 0.0),
}


@pytest.mark.parametrize("name", LABELLED)
def test_hyper_parameter_search_starts_each_trial_afresh_by_its_settings(name, tmp_path):
    """Two trials with the same settings end alike, bit for bit; one with others does not."""
    pytest.importorskip("optuna")
    setting, value = SEARCHED.get(name, ("learning_rate", 5e-3))
    plain, changed = {"learning_rate": 1e-3}, {"learning_rate": 1e-3, setting: value}
    losses = []
    family = "llama" if name in CAUSAL else "bert"
    student = prepared(name, make_student(tiny_model(family, seed=3), num_hidden_layers=2))

    def objective(metrics):
        losses.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    saves = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = build(name, tmp_path, max_steps=3, **saves, extra={"model_init": lambda: copy.deepcopy(student)})
    trainer.hyperparameter_search(lambda trial: (plain, plain, changed)[trial.number], compute_objective=objective,
                                  n_trials=3, backend="optuna")  # fmt: skip
    assert losses[0] == losses[1] != losses[2] and all(loss > 0 for loss in losses)
    assert {p.name for p in tmp_path.iterdir()} >= {"run-0", "run-1", "run-2"}


class Start(TrainerCallback):
    """What the model and the training state hold before the first step that is trained."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.state = {name: tensor.clone() for name, tensor in model.hfc_training_state.state_dict().items()}


@pytest.mark.parametrize("name", LONG)
def test_a_run_goes_on_with_another_batch_size(name, tmp_path):
    """From the checkpoint's weights and state, over the epoch's remaining examples, to the same number of steps."""
    build(name, tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    start, checkpoint = Start(), tmp_path / "checkpoint-2"
    trainer = build(name, tmp_path, seed=9, max_steps=4, per_device_train_batch_size=2, extra={"callbacks": [start]})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    weights = {key: t for key, t in load_file(checkpoint / "model.safetensors").items() if t.numel()}  # no sentinels
    assert weights and all(torch.equal(start.weights[key], tensor) for key, tensor in weights.items())
    if start.state:
        kept = load_file(checkpoint / "training_state.safetensors")
        assert kept.keys() == start.state.keys() and all(torch.equal(start.state[key], t) for key, t in kept.items())
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


WITHOUT_LABELS = [p for p in LONG if p.values[0] in DISTILLING]


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_losses_that_read_no_labels_are_told_of_data_without_any(name, tmp_path):
    """With alpha=1 a trainer trains, evaluates and predicts as it does where labels are there."""
    data = data_of(name, 8)
    trainer = build(name, tmp_path, alpha=1.0, max_steps=1)
    expected = trainer.evaluate(data)
    found = trainer.evaluate(data.remove_columns("labels"))
    losses = {key: value for key, value in expected.items() if key.endswith("loss")}
    assert len(losses) > 1
    assert {key: found[key] for key in losses} == pytest.approx(losses, rel=1e-6)
    output = trainer.predict(data.remove_columns("labels"))
    assert len(output.predictions) == 8 and output.label_ids is None
    trainer.train_dataset = data_of(name).remove_columns("labels")
    assert trainer.train().global_step == 1
