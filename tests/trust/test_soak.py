"""A long run grows nothing: a short one of `scripts/checks/soak.py` would show what is kept for every step."""

import gc

import pytest
import torch
from machine import needs_proc
from trust.trainers import build

from scripts.checks.soak import ALLOWED, growth, soak


def kept_graphs() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())


def test_a_step_of_head_pruning_frees_its_graph(tmp_path):
    """Each hook on a head's output once referred to that output: every step of training stayed in memory."""
    before = kept_graphs()
    trainer = build("HeadPruningTrainer", tmp_path, max_steps=5)
    trainer.train()
    assert kept_graphs() == before


@needs_proc
@pytest.mark.long
def test_handles_hooks_and_tensors_do_not_grow(tmp_path):
    """Distilling, pruning and quantizing at once, with a save and an evaluation after each step."""
    grown = growth(soak(20, tmp_path))
    assert all(grown[name] <= ALLOWED[name] for name in ("file_handles", "hooks", "tensors")), grown
