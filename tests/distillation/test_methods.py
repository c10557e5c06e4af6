"""What every method on the command line has in common."""

import math
from dataclasses import fields
from importlib import import_module

import pytest
from helpers import tiny_model
from transformers import TrainingArguments

import hf_compress as hfc
from distillation.data import rows
from distillation.training import trainer_of
from hf_compress.distillation import METHODS
from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.students import make_student
from hf_compress.distillation.trainer import DistillationTrainer

OTHER_DEFAULTS = {  # of Trainer's own options, which mean what they mean there
    "scales": {"adam_beta2", "learning_rate", "lr_scheduler_type", "max_grad_norm", "warmup_steps"}
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_config_and_a_trainer_that_the_package_offers(name):
    module, config, trainer = METHODS[name]
    assert getattr(hfc, config) is getattr(import_module(module), config)
    assert issubclass(getattr(hfc, config), DistillationConfig)
    assert issubclass(getattr(hfc, trainer), DistillationTrainer)
    assert getattr(hfc, trainer).config_class is getattr(hfc, config)


@pytest.mark.parametrize("name", METHODS)
def test_no_option_of_a_method_hides_one_of_trainer(name):
    """`project`, for one, names the place where Trackio logs."""
    kind = getattr(hfc, METHODS[name][1])
    own = {n for c in kind.__mro__ if c not in TrainingArguments.__mro__ for n in vars(c).get("__annotations__", ())}
    assert own & {f.name for f in fields(TrainingArguments)} == OTHER_DEFAULTS.get(name, set())
    assert own
    assert all(f.metadata.get("help") for f in fields(kind) if f.name in own)


INNER_LAYERS = ["tinybert", "pkd", "minilm", "distilbert", "bert-emd", "fsp", "relational"]


@pytest.mark.parametrize("name", INNER_LAYERS)
def test_methods_on_inner_layers_train_in_bf16_with_checkpointing(name, tmp_path):
    teacher = tiny_model(seed=3)
    student = make_student(teacher, num_hidden_layers=2)
    run = trainer_of(getattr(hfc, METHODS[name][2]), tmp_path, student, teacher, bf16=True, gradient_checkpointing=True,
                     gradient_checkpointing_kwargs={"use_reentrant": False}, max_steps=2)  # fmt: skip
    run.train()
    assert all(math.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in run.state.log_history[:2])


@pytest.mark.parametrize("name", ["pkd", "distilbert", "fsp", "relational"])
def test_methods_on_hidden_states_learn_from_a_cache_as_from_the_teacher(name, tmp_path):
    teacher, data = tiny_model(seed=3), rows(6)
    cache = hfc.cache_teacher(teacher, data, tmp_path / "cache", hidden_states=range(5))
    kind, losses = getattr(hfc, METHODS[name][2]), []
    for source in (teacher, cache):
        losses.append(trainer_of(kind, tmp_path, make_student(teacher, num_hidden_layers=2), source, data).evaluate())
    shared = [n for n in losses[0] if n.endswith("_loss")]
    assert {n: losses[0][n] for n in shared} == pytest.approx({n: losses[1][n] for n in shared}, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["minilm", "bert-emd"])
def test_attention_is_not_in_a_cache(name, tmp_path):
    teacher, data = tiny_model(seed=3), rows(6)
    cache = hfc.cache_teacher(teacher, data, tmp_path / "cache", hidden_states=range(5))
    with pytest.raises(ValueError, match="compares attention, for which the teacher has to run"):
        trainer_of(getattr(hfc, METHODS[name][2]), tmp_path, make_student(teacher, num_hidden_layers=2), cache, data)


@pytest.mark.parametrize("name", INNER_LAYERS)
def test_layers_of_several_teachers_have_no_mean(name, tmp_path):
    teachers = [tiny_model(seed=3), tiny_model(seed=4)]
    with pytest.raises(ValueError, match="layers of 2 teachers have no mean"):
        trainer_of(getattr(hfc, METHODS[name][2]), tmp_path, make_student(teachers[0], num_hidden_layers=2), teachers)
