"""Checkpoints that other tools wrote: where they lie, and which class they are of."""

from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def find_folder(folder_or_id: str | Path) -> Path:
    """The folder itself, or that of a repository on the Hub, downloaded."""
    folder = Path(folder_or_id)
    return folder if folder.is_dir() else Path(snapshot_download(str(folder_or_id), allow_patterns=FILES))


def model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that the checkpoint says it is of. Raises ValueError where it says nothing, or a class not known."""
    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        raise ValueError(f"{folder}/config.json must name an architecture of Transformers, got {name!r}.")
    return kind
