"""An exported folder as a model: what it is made of is told by its records, and a runtime runs it."""

import json
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.generic import ModelOutput

from hf_compress.checkpoint import bits, structure
from hf_compress.formats.export import installed
from hf_compress.formats.runtimes.agreement import Session, feed
from hf_compress.formats.runtimes.folder import RECORD

FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx", "gguf": "model.gguf"}
RUNTIMES = {"openvino": ("OpenVINO", "openvino"), "onnx": ("ONNX Runtime", "onnxruntime")}  # name, package
MANIFEST = "export.json"  # of transformers' exporters


@dataclass(frozen=True)
class Runtime:
    """Where a model runs that is not PyTorch's; `open_exported` leaves it at the model as `in_runtime`."""

    folder: Path
    format: str

    @property
    def name(self) -> str:
        """Such as "OpenVINO 2026.4.1"."""
        name, package = RUNTIMES[self.format]
        return f"{name} {version(package)}"

    def files(self) -> list[Path]:
        """The files that are needed to run: the graph and its weights."""
        stem = FILES[self.format].rpartition(".")[0]
        return sorted(path for path in self.folder.glob(f"{stem}.*") if path.is_file())


def exported_format(folder: Path) -> str | None:
    """The format of an exported folder; None for what is none, or holds weights for PyTorch as well."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((format for format, file in FILES.items() if (folder / file).is_file()), None)


def open_exported(folder: Path, *, threads: int | None = None) -> PreTrainedModel:
    """The model of an exported folder: its modules are empty, its forward runs what the folder holds on the CPU.

    `threads` by default as many as PyTorch has. Raises ValueError for a folder that cannot be run here, ImportError
    for a runtime that is not installed, naming the extra that brings it.
    """
    runtime, model, format = runner(folder), skeleton(folder), exported_format(folder)
    try:
        session = runtime.open_folder(folder, threads=threads or torch.get_num_threads())
    except Exception as error:  # each runtime has its own
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder} holds a damaged export, which {RUNTIMES[format][0]} refuses: {reason}") from error
    bits.prepare(model, _record(folder).get("bits") or {})
    model.forward, model.in_runtime = _forward(model, session), Runtime(folder, format)
    return model.eval()


def runner(folder: Path) -> ModuleType:
    """The module that opens an exported folder. Raises as `open_exported`."""
    format = exported_format(folder)
    if format == "gguf":
        raise ValueError(f"{folder} is for llama.cpp, which is not run from here: measure it with llama-bench.")
    return installed(format, f"hf_compress.formats.runtimes.{format}_session")


def runtime_of(model: PreTrainedModel) -> Runtime | None:
    """Where `model` runs; None for PyTorch."""
    return model.__dict__.get("in_runtime")


def skeleton(folder: Path) -> PreTrainedModel:
    """A model with the shapes of the exported one, all its weights stored alike and empty. To count, not to run."""
    try:
        exported = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        name = exported["components"]["model"]["metadata"]["architecture"]
        kind = getattr(transformers, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds a graph, but no {MANIFEST} that says of which model it is.") from error
    config, part = AutoConfig.from_pretrained(folder), _record(folder).get("structure") or {}
    with no_init_weights():
        model = kind(config)
    structure.prepare(model, part)
    structure.finish(model, part)
    return model.eval()


def _record(folder: Path) -> dict:
    """What compression changed; nothing in a folder that others wrote."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")).get("record") or {} if file.is_file() else {}


def _forward(model: PreTrainedModel, session: Session):
    """With the signature of the model's own."""

    @wraps(model.forward)
    def forward(**batch: Tensor) -> ModelOutput:
        found = session.run(feed(session, {name: value for name, value in batch.items() if isinstance(value, Tensor)}))
        return ModelOutput({name: torch.from_numpy(value) for name, value in found.items()})

    return forward
