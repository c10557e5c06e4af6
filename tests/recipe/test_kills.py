"""What is killed and started again ends in the same bytes, and loses nothing; the script does the same, more often."""

import random

import pytest
import torch
from machine import long_but, needs_fork

from scripts.checks.kill import JOBS, contents, kill, prepare

QUICK = {"save", "publish"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no others
    place = tmp_path_factory.mktemp("kills")
    prepare(place, steps=4)
    yield place
    torch.set_num_threads(threads)


@needs_fork
@pytest.mark.parametrize("job", long_but(JOBS, *QUICK))
def test_kills_change_no_byte_and_lose_nothing(job, place):
    before = contents(place)
    assert kill(job, 6, place, random.Random(job)) == []
    assert {name: data for name, data in contents(place).items() if name in before} == before
