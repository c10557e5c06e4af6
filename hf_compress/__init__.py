"""Distil, prune and quantize text models of Hugging Face Transformers, and keep them ordinary.

Names are loaded when first used, so that importing the package costs next to nothing; `__init__.pyi` says from where.
"""

import re
from importlib import import_module
from pathlib import Path

import hf_compress.checkpoint.loader  # noqa: F401  registers the loader of compressed checkpoints with Transformers
from hf_compress.version import __version__  # noqa: F401

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOMES = {name: module for module, name in re.findall(r"^from (\S+) import (\w+) as", _STUB, re.MULTILINE)}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__version__"])
