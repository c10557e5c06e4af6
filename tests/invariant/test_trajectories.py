"""No change moves the losses of a trainer unseen."""

import json

import pytest
from invariant.trajectories import FILE, STEPS, losses
from trust.trainers import TRAINERS

KEPT = json.loads(FILE.read_text(encoding="utf-8"))
# Without vector units (ATEN_CPU_CAPABILITY=default) losses moved by 1e-5 of themselves, those near zero by 3e-6, and
# under rounding, where an input or a weight may fall to the next level, by 1e-4.
TOLERANCE, ROUNDED = 1e-4, 1e-3


def test_every_trainer_has_a_trajectory():
    assert sorted(KEPT) == sorted(TRAINERS)
    assert {len(kept) for kept in KEPT.values()} == {STEPS}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_losses_are_those_that_were_kept(name, tmp_path):
    """A change that is meant writes the file anew: see `trajectories.py`."""
    tolerance = ROUNDED if name == "QBertTrainer" else TOLERANCE
    assert losses(name, tmp_path) == pytest.approx(KEPT[name], rel=tolerance, abs=1e-5)
