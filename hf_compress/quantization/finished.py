"""Keeps the layers that GPTQ is done with, so that a run that is cut off can go on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_compress.files.whole import beside, write_whole
from hf_compress.layers.scheme import WeightScheme
from hf_compress.quantization.grids import QuantizedWeight

PARTS = tuple(field.name for field in fields(QuantizedWeight))


def _content(model: nn.Module) -> str:
    """Of every tensor, so that no other model passes for this one."""
    content = hashlib.sha256()
    for name, module in model.named_modules():
        with align_module_device(module):  # where its weight is on disk
            for part, tensor in module.named_parameters(recurse=False):
                content.update(f"{name}.{part}".encode())
                content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


class FinishedLayers:
    """The quantized weights of the layers that are done, one file a layer, for a run that is cut off.

    Raises ValueError if the folder belongs to another model, calibration or set of options.
    """

    def __init__(self, folder: Path, model: nn.Module, schemes: Mapping[str, WeightScheme],
                 batches: Sequence[Mapping], settings: dict):  # fmt: skip
        self.folder = folder
        data = hashlib.sha256()
        for batch in batches:
            for key in sorted(batch):
                data.update(batch[key].cpu().numpy().tobytes())
        run = {
            "options": settings,
            "schemes": {name: scheme.to_dict() for name, scheme in schemes.items()},
            "calibration": data.hexdigest(),
            "weights": _content(model),
        }
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run.json"
        if file.exists():
            try:
                before = dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} cannot be read ({error}): choose an empty folder as resume_dir.") from error
            changed = [key for key in run if before.get(key) != run[key]]
            if changed:
                raise ValueError(
                    f"resume_dir {folder} holds a run with other {', '.join(changed)}. "
                    "Repeat that run's settings, or choose an empty folder."
                )
        write_whole(file, json.dumps(run, indent=1))

    def load(self, layer: str) -> dict[str, QuantizedWeight] | None:
        file = self.folder / f"{layer}.safetensors"
        if not file.exists():
            return None
        try:
            tensors = load_file(file)
            names = {key.rpartition(".")[0] for key in tensors}
            return {name: QuantizedWeight(*(tensors[f"{name}.{part}"] for part in PARTS)) for name in names}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and its layer is quantized again.") from error

    def save(self, layer: str, results: Mapping[str, QuantizedWeight]) -> None:
        tensors = {f"{n}.{part}": getattr(result, part).contiguous() for n, result in results.items() for part in PARTS}
        with beside(self.folder / f"{layer}.safetensors") as partial:
            save_file(tensors, partial)
