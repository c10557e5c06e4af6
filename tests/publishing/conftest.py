"""Shared by the tests of the Hub."""

import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between tries, and the large-file protocol that our server speaks."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
