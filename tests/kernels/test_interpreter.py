"""Runs the tests of the operators once more with the Triton kernels in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so this takes a process of its own. To see one test of it:

    TRITON_INTERPRET=1 pytest tests/kernels/test_wna16_matrix.py -k M17
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def interpreted(*files: str, marker: str = "not gpu and not long") -> None:
    paths = [str(Path(__file__).parent / name) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker, *paths]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("names", ["wna16_matrix", "launch bsr kl gptq_block"])
def test_kernels_in_the_interpreter(names):
    interpreted(*(f"test_{name}.py" for name in names.split()))


@pytest.mark.long
def test_whole_matrix_in_the_interpreter():
    interpreted("test_wna16_matrix.py", marker="long")
