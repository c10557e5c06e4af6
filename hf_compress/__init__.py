"""Distil, prune and quantize text models of Hugging Face Transformers, and keep them ordinary.

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hf_compress")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_HOMES = {  # public name -> module that defines it
    "anatomy": "hf_compress.anatomy",
    "capture": "hf_compress.capture",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
