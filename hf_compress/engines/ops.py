"""The one door from hf_compress to the kernels: every operator of `hf_compress_kernels`, under its own name.

    from hf_compress.engines.ops import wna16_linear

The implementation is the bundled package. The environment variable HF_COMPRESS_KERNELS names another one: a folder
built for the Hub, or `owner/name[@version]` of a kernel repository there, which needs `pip install kernels`. Naming a
repository means trusting its code. The variable is read once, when the first operator is used.
"""

import logging
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

VARIABLE = "HF_COMPRESS_KERNELS"


@cache
def implementation() -> ModuleType:
    """The module that the operators come from."""
    source = os.environ.get(VARIABLE, "")
    if not source:
        return import_module("hf_compress_kernels")
    try:
        import kernels  # optional: only those who name another implementation need it
    except ImportError as error:
        raise ImportError(
            f"{VARIABLE}={source} needs `pip install kernels`. Unset it for the bundled kernels."
        ) from error
    if Path(source).is_dir():
        module = kernels.get_local_kernel(Path(source))
    else:
        repo_id, _, version = source.partition("@")
        if repo_id.count("/") != 1 or not (version or "1").isdigit():
            raise ValueError(
                f"{VARIABLE} must be a folder or owner/name[@version], got {source!r}, and there is no such folder."
            )
        module = kernels.get_kernel(repo_id, version=int(version or 1), trust_remote_code=[repo_id])
    logger.info("Operators come from %s (%s=%s)", module.__name__, VARIABLE, source)
    return module


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    operators = implementation()
    if name not in operators.__all__:
        raise AttributeError(f"{operators.__name__} has no operator {name!r}; it has {', '.join(operators.__all__)}.")
    return getattr(operators, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *implementation().__all__])
