"""How the states of a text's tokens become one vector, as folders of sentence-transformers say and read it.

modules.json             the steps: the model, the pooling, a linear map or none, a vector of length one or not
1_Pooling/config.json    mean | cls | lasttoken | max
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.files.whole import write_whole

MODES = ("mean", "cls", "lasttoken", "max")
KIND = "sentence_transformers.models."  # every version of it reads these names


@dataclass(frozen=True)
class Pooling:
    """mode: of `MODES`. normalize: whether vectors have length 1."""

    mode: str = "mean"
    normalize: bool = True

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"pooling must be one of {MODES}, got {self.mode!r}.")

    def __call__(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """states (B, T, D) and their mask (B, T), 0 for padding on either side -> (B, D)."""
        mask = torch.ones_like(states[..., 0]) if mask is None else mask
        real = mask.bool()[..., None]
        if self.mode == "max":
            return states.masked_fill(~real, -torch.inf).amax(dim=1)
        if self.mode == "mean":
            weights = real.to(states.dtype)
            return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask.bool(), positions, -1).amax(dim=1)
        number = mask.bool().int().argmax(dim=1) if self.mode == "cls" else last.clamp(min=0)
        return states[torch.arange(len(states), device=states.device), number]


def read_pooling(folder: str | Path) -> Pooling | None:
    """What a folder of sentence-transformers says; None for one that is not theirs.

    Raises ValueError for steps that are more than a pooling, or poolings that are several at once.
    """
    steps = _steps(folder)
    if any(kind == "Dense" for kind, _ in steps):
        raise ValueError(
            f"{Path(folder) / 'modules.json'} has the steps {[kind for kind, _ in steps]}; expected Transformer and "
            "Pooling, then Normalize or nothing. Give the pooling by name, and what follows it will not be learned."
        )
    return _pooling(folder, steps) if steps else None


def read_vectors(folder: str | Path) -> tuple[Pooling, Tensor | None]:
    """As `read_pooling`, with the linear map (out, width) of vectors that may follow; the mean where nothing is said.

    Raises ValueError for a map with a bias or an activation function, and for other steps.
    """
    steps = _steps(folder)
    dense = next((path for kind, path in steps if kind == "Dense"), None)
    weight = None
    if dense is not None:
        from safetensors.torch import load_file  # 10 ms that only this needs

        config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
        if config.get("bias") or not config["activation_function"].endswith("Identity"):
            raise ValueError(f"{dense} has a bias or an activation function; expected a linear map alone.")
        weight = load_file(dense / "model.safetensors")["linear.weight"]
    return (_pooling(folder, steps) if steps else Pooling()), weight


def copy_pooling(source: str | Path, folder: str | Path) -> None:
    """What makes a vector of a text's states, from a folder of sentence-transformers to another; nothing from others.

    Raises ValueError as `read_pooling` does for steps that are not ours to copy.
    """
    for kind, path in _steps(source):
        for file in path.iterdir() if kind in ("Pooling", "Dense") else ():
            _copy(file, Path(folder) / path.name / file.name)
        if kind == "Transformer":
            _copy(Path(source) / "modules.json", Path(folder) / "modules.json")


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    write_whole(to, file.read_bytes())


def makes_vectors(folder: str | Path) -> bool:
    """Whether sentence-transformers pools the states of a folder's model, and so reads no head that its config names.

    A sparse encoder's `SpladePooling` reads the head's logits.
    """
    return "Pooling" in _kinds(_listed(folder))


def _listed(folder: str | Path) -> list[dict]:
    """The steps as they are written; none where the folder is not theirs."""
    listed = Path(folder) / "modules.json"
    return json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []


def _kinds(steps: list[dict]) -> list[str]:
    return [step["type"].rpartition(".")[2] for step in steps]


def _steps(folder: str | Path) -> list[tuple[str, Path]]:
    """The kind of each step and its folder; none where the folder is not theirs."""
    listed, steps = Path(folder) / "modules.json", _listed(folder)
    if not steps:
        return []
    kinds = _kinds(steps)
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in (
        [], ["Normalize"], ["Dense"], ["Dense", "Normalize"]
    ):  # fmt: skip
        raise ValueError(
            f"{listed} has the steps {kinds}; expected Transformer and Pooling, then Normalize or nothing. Give the "
            "pooling by name, and what follows it will not be learned."
        )
    for step in steps:
        if Path(step["path"]).is_absolute() or ".." in Path(step["path"]).parts:
            raise ValueError(f"{listed} names the folder {step['path']!r}, which is not inside of it.")
    return [(kind, Path(folder) / step["path"]) for kind, step in zip(kinds, steps, strict=True)]


def _pooling(folder: str | Path, steps: list[tuple[str, Path]]) -> Pooling:
    config = json.loads((steps[1][1] / "config.json").read_text(encoding="utf-8"))
    named = config.get("pooling_mode") or [mode for mode, key in _KEYS.items() if config.get(key)]
    named = named if isinstance(named, list) else [named]
    if len(named) != 1:
        raise ValueError(f"{folder} joins the poolings {named}: expected one of {MODES}.")
    return Pooling(named[0], normalize=any(kind == "Normalize" for kind, _ in steps))


def pooling_of(model: PreTrainedModel) -> Pooling:
    """How the folder that `model` came from makes a vector of a text; the mean, of length 1, where it says nothing.

    Raises ValueError for steps that are more than a pooling.
    """
    source = model.name_or_path
    try:
        return (read_pooling(source) if source else None) or Pooling()
    except ValueError as error:
        raise ValueError(
            f"The vectors of {source} are made by more than a pooling, which has no place here: {error}"
        ) from error


_KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens",
         "lasttoken": "pooling_mode_lasttoken"}  # fmt: skip


def write_pooling(folder: str | Path, pooling: Pooling, width: int, dense: Tensor | None = None) -> None:
    """Write beside a saved model of `width` what makes `SentenceTransformer(folder)` open it.

    dense  (out, width)  a linear map of the vectors, written as a step of its own
    """
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
    config = {"word_embedding_dimension": width, **{key: mode == pooling.mode for mode, key in _KEYS.items()}}
    _write(Path(folder) / "1_Pooling" / "config.json", config)
    if dense is not None:
        from safetensors.torch import save  # 10 ms that only this needs

        steps.append(("2_Dense", "Dense"))
        identity = f"{nn.Identity.__module__}.{nn.Identity.__name__}"
        out = {"in_features": width, "out_features": len(dense), "bias": False, "activation_function": identity}
        _write(Path(folder) / "2_Dense" / "config.json", out)
        tensors = {"linear.weight": dense.detach().float().cpu().contiguous()}
        write_whole(Path(folder) / "2_Dense" / "model.safetensors", save(tensors))
    if pooling.normalize:
        steps.append((f"{len(steps)}_Normalize", "Normalize"))
    listed = [{"idx": i, "name": str(i), "path": path, "type": KIND + kind} for i, (path, kind) in enumerate(steps)]
    _write(Path(folder) / "modules.json", listed)


def _write(file: Path, content: dict | list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=2) + "\n")
