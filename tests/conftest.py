"""One thread for each test: the models are tiny, and threads that wait for each other only cost time."""

import gc
import os
from pathlib import Path

import torch

ROOT = str(Path(__file__).parents[1])


def pytest_configure(config):
    torch.set_num_threads(1)
    # A process that a test starts finds `scripts` and the tests' helpers as the test itself does.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [ROOT, str(Path(ROOT, "scripts")), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def pytest_collection_finish() -> None:
    """What the imports have made stays: each training collects garbage, and need not look through it every time."""
    gc.collect()
    gc.freeze()
