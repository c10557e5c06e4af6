"""A plugin of pytest that puts a trainer of ours in the place of `transformers.Trainer`, before tests are collected.

`HFC_TRAINER` names it. What it needs beside a Trainer's arguments is made here: a teacher that is a copy of the model,
and settings of its own that leave the training as it is (alpha 0; nothing pruned; weights in 8 bits, tables as they
are). A test whose model it cannot train, and says so when it is made, does not apply.
"""

import copy
import inspect
import os
import sys
from dataclasses import fields

import pytest
import transformers
from torch import nn

import hf_compress as hfc

OWN = {
    "DistillationTrainer": {"alpha": 0.0},
    "HeadPruningTrainer": {"sparsity": 0.0},
    "WeightPruningTrainer": {"sparsity": 0.0},
    "BlockPruningTrainer": {"sparsity": 0.0},
    "QBertTrainer": {"average_bits": 8.0, "embedding_bits": None},
}


class NotApplicable(pytest.fail.Exception):
    """A model that a trainer refuses, by a sentence, before training."""


def combined(config: type, kind: type) -> type:
    """A kind of arguments that is both; by a name of this module, so that it can be saved with checkpoints."""
    name = f"{config.__name__}And{kind.__name__}"
    return globals().setdefault(name, type(name, (config, kind), {"__module__": __name__}))


def first_model(make) -> nn.Module | None:
    """What a `model_init` makes; some take the trial of a search, which has not begun."""
    return None if make is None else make(*[None] * len(inspect.signature(make).parameters))


def in_place(name: str) -> type:
    """A subclass that is made as `Trainer` is."""
    kind, config = getattr(hfc, name), getattr(hfc, name.replace("Trainer", "Config"))

    def adapted(args):
        """Its own arguments, made of those of `Trainer`: the same object's values, none checked again."""
        if args is None or isinstance(args, config):
            return args
        own = object.__new__(combined(config, type(args)))
        own.__dict__.update(args.__dict__)
        for field in fields(config):
            if field.name not in own.__dict__ and not hasattr(args, field.name):
                setattr(own, field.name, OWN[name].get(field.name, field.default))
        return own

    def made(self, model=None, args=None, *positional, **kwargs):
        extra = {}
        if issubclass(kind, hfc.DistillationTrainer) and "teacher_model" not in kwargs:
            taught = model if model is not None else first_model(kwargs.get("model_init"))
            if not isinstance(taught, nn.Module):
                raise NotApplicable("there is no model that a teacher could be a copy of")
            extra["teacher_model"] = copy.deepcopy(taught)
        try:
            kind.__init__(self, model, adapted(args), *positional, **kwargs, **extra)
        except (ValueError, TypeError) as error:
            frames, trace = [], error.__traceback__
            while trace is not None:
                frames.append(trace.tb_frame.f_globals.get("__name__", ""))
                trace = trace.tb_next
            if frames[-1].startswith("hf_compress."):  # a refusal; what Trainer raises is the test's to judge
                raise NotApplicable(f"{name}: {error}") from error
            raise

    return type(name, (kind,), {"__init__": made, "__module__": __name__})


NAME = os.environ.get("HFC_TRAINER", "Trainer")
REPLACED = transformers.Trainer if NAME == "Trainer" else in_place(NAME)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Transformers' lazy module can be another object after its first use: the one that tests will import from."""
    for name in ("transformers", "transformers.trainer"):
        sys.modules[name].Trainer = REPLACED
