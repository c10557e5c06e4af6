"""What a model takes on the disk."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from hf_compress.formats.runtimes.opened import runtime_of
from hf_compress.measuring.identity import model_identity, read_header, weight_files
from hf_compress.training.progress import our_bars_alone


def stored_size(model: PreTrainedModel, folder: Path | None = None) -> tuple[int, int, str | None]:
    """Bytes of the files (safetensors, their index, config.json), of the tensors alone, without file headers, and which
    model they are, see `model_identity`.

    Of `folder` when it holds safetensors, else of what `save_pretrained` writes. Of a model that a runtime runs: the
    files that it needs, and no identity.
    """
    if (runtime := runtime_of(model)) is not None:
        size = sum(file.stat().st_size for file in runtime.files())
        return size + (runtime.folder / "config.json").stat().st_size, size, None
    weights = weight_files(folder) if folder else []
    if not weights:
        with tempfile.TemporaryDirectory() as temporary, our_bars_alone():
            model.save_pretrained(temporary)
            return stored_size(model, Path(temporary))
    others = [folder / name for name in ("config.json", "model.safetensors.index.json")]
    size = sum(file.stat().st_size for file in [*weights, *others] if file.is_file())
    return size, sum(_tensor_bytes(file) for file in weights), model_identity(folder)


def _tensor_bytes(file: Path) -> int:
    """Sum of the tensors of a safetensors file, from its header."""
    header, _ = read_header(file)
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return sum(end - start for start, end in offsets)
