"""What a stage's result depends on, as short texts that change when it does."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from hf_compress.checkpoint.opening import check_source
from hf_compress.files.whole import file_digest
from hf_compress.recipe.options import RecipeError
from hf_compress.version import __version__

LENGTH = 16  # characters; of different results among a thousand, two are mistaken with probability 1e-14
# what changes where, how often and how loudly, but not what comes out
WITHOUT_EFFECT = {
    "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step",
    "logging_nan_inf_filter", "logging_steps", "logging_strategy", "output_dir", "overwrite_output_dir", "report_to",
    "run_name", "save_strategy", "save_steps", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "project", "skip_memory_metrics", "resume_dir",
}  # fmt: skip


def digest(value: Any) -> str:
    """Of anything made of plain values; the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def settings(options: Any) -> dict[str, Any]:
    """The fields of an options dataclass that differ from what it would have by itself, as plain values."""
    if not is_dataclass(options):
        raise TypeError(f"expected a dataclass of options, got {type(options).__name__}.")
    changed = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in WITHOUT_EFFECT and field.init and value != field.default:
            changed[field.name] = value.value if isinstance(value, Enum) else value
    return changed


def model_fingerprint(source: str | Path) -> str:
    """Of the files of a folder, or the commit of a name on the Hub. Raises RecipeError for what is neither."""
    try:
        check_source(source)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    folder = Path(source)
    if folder.is_dir():
        files = sorted(
            p for p in folder.iterdir() if p.is_file() and p.name != "README.md" and not p.name.startswith(".")
        )
        return digest({file.name: file_digest(file) for file in files})
    config = cached_file(str(source), "config.json")
    return Path(config).parent.name  # snapshots are called by their commit


@cache
def code_fingerprint() -> str:
    """Of this package's code, which may have changed though its version has not."""
    code = Path(__file__).parents[1]
    return digest([__version__, {str(f.relative_to(code)): file_digest(f) for f in sorted(code.rglob("*.py"))}])
