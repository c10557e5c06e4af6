"""What a model is opened from: a folder that holds one, or a sentence that says what it holds; and none with weights
that no file had.

Transformers fills what is missing by chance, and tells it in a report that a person who only asked for figures does not
see.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

WEIGHTS = ".safetensors", ".bin", ".index.json"  # how files end that Transformers loads
LFS = b"version https://git-lfs"
ADAPTER, PARTS = "adapter_config.json", "modules.json"  # of PEFT; of sentence-transformers
PIECE = 1 << 24  # weights that are looked at together
MEND = "Give a folder of `save_pretrained` or of `export`."


def model_folder(source: str | Path) -> str | Path:
    """`source`, or the folder of the model in what `hf-compress run` wrote."""
    folder = Path(source)
    is_run = not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file()
    return folder / "model" if is_run else source


def check_source(source: str | Path) -> None:
    """Raise ValueError for what no model is opened from: a path that is not there, a folder without one, a name that
    the Hub does not know. Weights are not read, but for the headers of safetensors files."""
    folder, written = Path(source), str(source)
    if folder.is_dir():
        check_config(folder)
        check_files(folder)
        return
    if folder.is_file():
        raise ValueError(f"There is no model {source}: it is a file. {MEND}")
    is_path = folder.is_absolute() or written.startswith(".") or written.endswith("/") or written.count("/") > 1
    if is_path:
        raise ValueError(f"There is no model {source}: it is no folder here.")
    try:
        validate_repo_id(written)
        cached_file(written, "config.json")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"There is no model {written!r}: it is no folder here, and {reason}") from error


def check_config(folder: Path) -> None:
    """Raise ValueError where Transformers makes no model of what config.json says, or where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no model: there is no config.json in it. {_instead(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}. Save the model again.") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{file} names no model_type: it is no model of Transformers. {MEND}")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{file} must name a list of classes as architectures, and has {classes!r:.60}.")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ValueError(f"{folder} runs code of its own, which hf_compress does not: {kind!r} is not in Transformers.")
    raise ValueError(
        f"{file} has the model_type {kind!r}, which Transformers {transformers.__version__} does not know."
    )


def check_files(folder: Path) -> None:
    """Raise ValueError where a folder holds no weights, or a file of them is torn, or none."""
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(WEIGHTS))
    are_exported = any(folder.glob("*.onnx")) or any(folder.glob("*.xml")) or any(folder.glob("*.gguf"))
    if not names and not are_exported:
        raise ValueError(
            f"{folder} holds no model: there is a config.json, but neither safetensors nor the graph of an export. "
            f"{MEND}"
        )
    for name in (name for name in names if name.endswith(WEIGHTS[-1])):
        try:
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            parts = {str(part) for part in told["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / name} names no files: it is damaged, or not wholly there.") from error
        if gone := sorted(part for part in parts if not (folder / part).is_file()):
            raise ValueError(f"{folder} lacks {gone[0]}, one of {len(parts)} files of its weights ({len(gone)} such).")
    for name in (name for name in names if name.endswith(WEIGHTS[0])):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            with (folder / name).open("rb") as file:
                is_pointer = file.read(len(LFS)) == LFS
            told = "is a pointer of Git LFS: fetch the file itself, by `git lfs pull`." if is_pointer else (
                f"is damaged, or not wholly there: {error}.")  # fmt: skip
            raise ValueError(f"{folder / name} {told}") from error


def _instead(folder: Path) -> str:
    """What a folder without a config.json holds, and what to give in its place."""
    if (folder / ADAPTER).is_file():
        return (
            "It is an adapter of PEFT: merge it into its model first, merge_and_unload() and then save_pretrained, and "
            "give that folder."
        )
    if any(folder.glob("*.gguf")):
        return "A GGUF file is of llama.cpp and is not read here: give the model that it was written from."
    within = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if within:  # of a training's checkpoints the last by name, which is near enough
        return f"Did you mean {folder / within[-1]}?"
    if (folder / PARTS).is_file():
        return "Its modules.json is of sentence-transformers: give the folder of its Transformer."
    return MEND


def open_model(
    model_class: type[PreTrainedModel], source: str | Path, *, new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(source)`, in which every weight is one of the files', and a number.

    With `new_head`, what is not of the backbone may be new. So may a pooler, and a head that the class adds to what the
    config names. Raises ValueError for what is missing, of another shape, or NaN or infinite.
    """
    try:
        model, told = model_class.from_pretrained(source, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"The weights of {source} have other shapes than its config.json says.") from error
    if getattr(model.config, "quantization_config", None):
        return model  # whose reader has looked at everything
    is_named = type(model).__name__ in (model.config.architectures or [])
    backbone = "" if model.base_model is model else f"{model.base_model_prefix}."
    lost = [name for name in sorted(told["missing_keys"]) if "pooler." not in name
            and (name.startswith(backbone) or (is_named and not new_head))]  # fmt: skip
    if lost:
        raise ValueError(
            f"{lost[0]} is in none of the files of {source} ({len(lost)} such weights): they are not whole, or of "
            "another model than config.json."
        )
    for name, weight in model.named_parameters():
        is_read = weight.is_floating_point() and not weight.is_meta and name not in told["missing_keys"]
        pieces = weight.detach().flatten().split(PIECE) if is_read else ()
        if not all(piece.isfinite().all() for piece in pieces):
            raise ValueError(
                f"{name} of {source} holds NaN or infinity: the file is damaged, or the training had diverged."
            )
    return model
