"""Public verbs in any order: after each the model answers as a slow reference says, or the verb was refused."""

import os
import random
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trust.verbs import VERBS, Walk

FAMILIES = ("bert", "distilbert", "llama", "bart")
BOUND = 1e-9  # of a logit in float64: what sums in another order differ by, many times over
STEPS = st.lists(st.tuples(st.sampled_from(sorted(VERBS)), st.integers(0, 999)), min_size=3, max_size=6)
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def check(family: str, steps: list[tuple[str, int]], *, may_refuse: bool = True) -> None:
    """Each step is a verb and the seed of what it draws."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, HF_COMPRESS_CPU="exact"):
        walk = Walk.begin(family, Path(folder))
        for name, seed in steps:
            before = walk.logits()
            try:
                expected = VERBS[name](walk, random.Random(seed))
            except (ValueError, TypeError) as error:
                walk.done.append(f"{name} (refused)")
                assert may_refuse and len(str(error)) > 40, f"{walk.done}: {error}"
                assert torch.equal(walk.logits(), before), f"{walk.done}: the model is another one"
                continue
            walk.done.append(name)
            torch.testing.assert_close(
                walk.logits(),
                expected,
                rtol=0,
                atol=BOUND,
                msg=lambda text: f"{walk.done}: {text}",  # noqa: B023
            )


@given(family=st.sampled_from(FAMILIES), steps=STEPS)
@settings(max_examples=12, derandomize=True, **SETTINGS)
def test_a_few_sequences_of_verbs(family, steps):
    check(family, steps)


@pytest.mark.long
@given(family=st.sampled_from(FAMILIES), steps=STEPS)
@settings(max_examples=500, **SETTINGS)
def test_many_sequences_of_verbs(family, steps):
    check(family, steps)


LAST = ("block_sparse", "quantize", "dequantize", "save_and_load")  # what they leave is no ordinary model, or need one
OTHERS = ("student", "train_with_grids", "dequantize", "codebooks", "dequantize", "low_rank", "vocabulary", "factorise")
STEADY = sorted(VERBS.keys() - {*LAST, *OTHERS} | {"vocabulary"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_in_which_no_verb_may_refuse(family):
    """So that what the sequences show is not refusals alone."""
    check(family, [(name, 1) for name in (*STEADY, *LAST)], may_refuse=False)
    check(family, [(name, 2) for name in OTHERS], may_refuse=False)
