"""Checkpoints that other tools wrote: where they lie, which class they are of, which modules their patterns mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import regex
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig, PreTrainedModel

PATTERN_SECONDS = 1.0  # for one pattern and one name; an honest one takes a millionth of it
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def find_folder(folder_or_id: str | Path) -> Path:
    """The folder itself, or that of a repository on the Hub, downloaded. Raises ValueError for what is neither."""
    if not isinstance(folder_or_id, str | Path):
        raise TypeError(f"expected a folder or the name of a repository, got {type(folder_or_id).__name__}.")
    if Path(folder_or_id).is_dir():
        return Path(folder_or_id)
    try:
        validate_repo_id(str(folder_or_id))
        return Path(snapshot_download(str(folder_or_id), allow_patterns=FILES))
    except (OSError, ValueError) as error:  # of the name, of the Hub, of the way to it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"There is no checkpoint {str(folder_or_id)!r}: it is no folder here, and {reason}") from error


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Makes a sentence of what Transformers raises, in many kinds, for a config or tensors that it cannot read."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"{folder} cannot be read: {type(error).__name__}: {lines[-1].strip()}") from error


def model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that the checkpoint says it is of. Raises ValueError where it says nothing, or a class not known."""
    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        raise ValueError(f"{folder}/config.json must name an architecture of Transformers, got {name!r}.")
    return kind


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression from a file means the module `name`, from its beginning.

    Raises ValueError for what is no expression, and for one that was written to take for ever.
    """
    try:
        return regex.match(pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"The pattern {pattern[:100]!r} takes too long on {name!r}: it is damaged, or hostile."
        ) from None
    except (regex.error, TypeError, RecursionError) as error:
        raise ValueError(f"{str(pattern)[:100]!r} is no pattern of module names: {error}.") from error
