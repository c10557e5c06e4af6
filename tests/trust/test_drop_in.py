"""What users of `Trainer` rely on, for every trainer of the project: they are Trainers, so all of it works."""

from pathlib import Path

import pytest
import torch
from distillation.data import rows
from helpers import tiny_model
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from trust.trainers import TRAINERS, build, data_of, run

import hf_compress as hfc
from hf_compress.distillation.students import make_student
from hf_compress.pruning.trainer import PruningTrainer

QUICK = ("PKDTrainer", "BlockPruningTrainer", "QBertTrainer")
LONG = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in TRAINERS]
# They draw anew in each forward, watch the range of each, or compare examples that are in a batch together.
CUT_DEPENDENT = {"HeadGatesTrainer", "LayerPruningTrainer", "QBertTrainer", "RelationalTrainer", "TheseusTrainer"}
ACCUMULATING = [p for p in LONG if p.values[0] not in CUT_DEPENDENT]


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


@pytest.mark.parametrize("name", LONG)
def test_rotation_best_model_early_stopping_own_optimiser_and_prediction(name, tmp_path):
    """Scores fall after the second step, so a patience of two ends the training after the fourth."""
    scores, events = iter([0.1, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]), Events()
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = build(
        name, tmp_path, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="score",
        gradient_accumulation_steps=2, per_device_train_batch_size=2, **steps,
        extra={"callbacks": [EarlyStoppingCallback(2), events], "compute_metrics": lambda _: {"score": next(scores)},
               "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})},
    )  # fmt: skip
    trainer.train()
    assert events.seen == {"step": 4, "save": 4, "evaluate": 4}
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"checkpoint-2", "checkpoint-4"}
    if not isinstance(trainer, PruningTrainer):  # those have cut the best model by now
        best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        assert all(torch.equal(t, best[n]) for n, t in trainer.model.state_dict().items() if n in best)
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


@pytest.mark.parametrize("name", LONG)
def test_iterable_datasets_are_trained_on_for_max_steps(name, tmp_path):
    data = data_of(name, 8).to_iterable_dataset()
    trainer = build(name, tmp_path, max_steps=3, extra={"train_dataset": data})
    assert trainer.train().global_step == 3
    assert sum("loss" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.long
@pytest.mark.parametrize("name", ["DistillationTrainer", "HeadPruningTrainer"])
def test_hyper_parameter_search_starts_each_trial_afresh(name, tmp_path):
    pytest.importorskip("optuna")
    kind, config = getattr(hfc, name), getattr(hfc, name.replace("Trainer", "Config"))
    teacher = tiny_model("bert", seed=3)

    def model_init(trial=None):
        torch.manual_seed(0)
        return make_student(teacher, num_hidden_layers=2)

    args = config(str(tmp_path), use_cpu=True, max_steps=6, report_to="none", disable_tqdm=True, save_strategy="no",
                  eval_strategy="steps", eval_steps=6)  # fmt: skip
    extra = {"teacher_model": teacher} if name == "DistillationTrainer" else {}
    trainer = kind(None, args, model_init=model_init, train_dataset=rows(), eval_dataset=rows(8), **extra)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}, n_trials=2, backend="optuna"
    )
    assert best.objective > 0 and 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-3
