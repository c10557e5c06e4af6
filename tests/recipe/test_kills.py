"""A recipe that is killed and started again ends in the same bytes; the script does the same, more often."""

import subprocess
import sys
from pathlib import Path

import pytest
from machine import needs_proc

ROOT = Path(__file__).parents[2]


@needs_proc
@pytest.mark.long
def test_two_kills_change_no_byte():
    command = [sys.executable, "scripts/checks/kill.py", "--kills", "2", "--kills-per-run", "2", "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("killed at") == 2
    assert done.stdout.endswith("2 kills in 1 runs: 1 of 1 ended in the same bytes\n")
