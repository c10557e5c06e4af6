"""What every method on the command line has in common."""

from dataclasses import fields
from importlib import import_module

import pytest
from transformers import TrainingArguments

import hf_compress as hfc
from hf_compress.distillation import METHODS
from hf_compress.distillation.trainer import DistillationConfig, DistillationTrainer


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
    assert own and not own & {f.name for f in fields(TrainingArguments)}
    assert all(f.metadata.get("help") for f in fields(kind) if f.name in own)
