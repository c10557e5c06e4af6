"""Size and speed of one model, or of several that take turns."""

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_compress.engines import processor
from hf_compress.layers.packed_module import routes_of
from hf_compress.measuring.counting import multiply_adds, num_parameters, sparsity
from hf_compress.measuring.identity import model_identity, read_header, weight_files
from hf_compress.measuring.timing import Spread, peak_allocated_bytes, synchronize, time_interleaved
from hf_compress.model.inputs import THROUGHPUT_BATCH, example_batch
from hf_compress.version import __version__

logger = logging.getLogger(__name__)

LATENCY_BATCH = 1
Source = PreTrainedModel | str | Path


@dataclass(frozen=True)
class Measurement:
    """What a model costs. Speeds hold for this device, these threads, this dtype and this sequence length."""

    parameters: int  # weights as stored: zeros count, packed values count once each
    stored_bytes: int  # weight files and config.json; no tokenizer
    bits_per_weight: float  # all stored tensors (scales, zero points and indices too) over `parameters`
    sparsity: dict[str, float]  # share of zeros by kind, see `counting.sparsity`
    multiply_adds: int  # of one example of `sequence_length` tokens
    latency_ms: Spread  # of one forward of one example
    throughput: Spread  # examples a second in batches of 32
    peak_memory_bytes: int  # the model's tensors, and the most a forward of 32 examples holds beside them
    sequence_length: int | None  # None for a model of pixels
    dtype: str
    device: str
    threads: int
    versions: dict[str, str]
    cpu_mode: str = "auto"  # what HF_COMPRESS_CPU asked of compressed layers
    routes: dict[str, int] = field(default_factory=dict)  # how many packed layers each way of multiplying ran
    identity: str | None = None  # of the stored files, see `model_identity`: which model this is


def measure(
    model: Source,
    *,
    sequence_length: int = 128,
    inputs: Mapping[str, Tensor] | None = None,
    latency_rounds: int = 50,
    throughput_rounds: int = 10,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Measurement:
    """Measure a model, a folder that holds one, or one of the Hub.

    model            a given model is measured where it is and as it is; a folder or name is loaded first
    sequence_length  of the random tokens that the model is run on
    inputs           real examples instead: tensors (B, T) as a tokenizer returns them; rows repeat to fill 32
    dtype, device    for a model that is loaded here; as stored, and the accelerator if there is one, by default

    Raises ValueError when the folder holds no model or the inputs do not fit it.
    """
    folder = local_folder(model)
    loaded = load_model(model, dtype=dtype, device=device)
    return measure_together(
        [loaded],
        folders=[folder],
        sequence_length=sequence_length,
        inputs=inputs,
        latency_rounds=latency_rounds,
        throughput_rounds=throughput_rounds,
    )[0]


def measure_together(
    models: Sequence[PreTrainedModel],
    *,
    folders: Sequence[Path | None] | None = None,
    sequence_length: int = 128,
    inputs: Mapping[str, Tensor] | None = None,
    latency_rounds: int = 50,
    throughput_rounds: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure several models, timed in turns (A B C, A C B, ...) so that their ratios hold on a busy machine.

    `folders[i]`, where given, is the folder that `models[i]` was loaded from: its files are its size. The others are
    saved to a temporary folder. `clock` gives seconds. The rest is as in `measure`.
    """
    devices = {str(model.device) for model in models}
    if len(devices) != 1:
        raise ValueError(f"models that are compared must be on one device, got {sorted(devices)}. Move them first.")
    folders = folders or [None] * len(models)
    stored = [stored_size(model, folder) for model, folder in zip(models, folders, strict=True)]
    with evaluating(models):
        batches = [example_batch(model, sequence_length=sequence_length, inputs=inputs) for model in models]
        single = [{key: value[:LATENCY_BATCH] for key, value in batch.items()} for batch in batches]
        counts = [multiply_adds(model, batch) for model, batch in zip(models, single, strict=True)]
        peaks = [_peak_memory_bytes(model, batch) for model, batch in zip(models, batches, strict=True)]
        logger.info("timing %d models at batch %d and %d", len(models), LATENCY_BATCH, THROUGHPUT_BATCH)
        latencies = time_interleaved(_forwards(models, single), rounds=latency_rounds, clock=clock)
        seconds = time_interleaved(_forwards(models, batches), rounds=throughput_rounds, clock=clock)
    measurements = []
    for i, model in enumerate(models):
        parameters = num_parameters(model)
        stored_bytes, tensor_bytes, identity = stored[i]
        measurements.append(
            Measurement(
                parameters=parameters,
                stored_bytes=stored_bytes,
                bits_per_weight=8 * tensor_bytes / parameters,
                sparsity=sparsity(model),
                multiply_adds=counts[i],
                latency_ms=Spread.of([1e3 * t for t in latencies[i]]),
                throughput=Spread.of([THROUGHPUT_BATCH / t for t in seconds[i]]),
                peak_memory_bytes=peaks[i],
                sequence_length=batches[i]["input_ids"].shape[1] if "input_ids" in batches[i] else None,
                dtype=str(model.dtype).removeprefix("torch."),
                device=device_name(model.device),
                threads=torch.get_num_threads(),
                cpu_mode=processor.mode(),
                routes=routes_of(model),
                versions=versions(),
                identity=identity,
            )
        )
    return measurements


def load_model(source: Source, *, dtype: torch.dtype | None = None, device: str | None = None) -> PreTrainedModel:
    """The model itself if it is one; else loaded as the class that its config names, in eval mode."""
    if isinstance(source, PreTrainedModel):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a Transformers model, a folder or a Hub name, got {type(source).__name__}.")
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: there is no config.json in it. Give a folder of `save_pretrained`.")
    if path.is_absolute() and not path.is_dir():
        raise ValueError(f"{path} is no folder. Give a folder of `save_pretrained` or a Hub name.")
    config = AutoConfig.from_pretrained(source)
    model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0], AutoModel)
    model = model_class.from_pretrained(source, dtype=dtype or "auto")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device)


def local_folder(source: Source) -> Path | None:
    """The folder that `source` names, None for a model or a name of the Hub."""
    return Path(source) if isinstance(source, (str, Path)) and Path(source).is_dir() else None


def stored_size(model: PreTrainedModel, folder: Path | None = None) -> tuple[int, int, str | None]:
    """Bytes of the files (safetensors, their index, config.json), of the tensors alone, without file headers, and which
    model they are, see `model_identity`.

    Of `folder` when it holds safetensors, else of what `save_pretrained` writes.
    """
    weights = weight_files(folder) if folder else []
    if not weights:
        with tempfile.TemporaryDirectory() as temporary, _no_progress_bar():
            model.save_pretrained(temporary)
            return stored_size(model, Path(temporary))
    others = [folder / name for name in ("config.json", "model.safetensors.index.json")]
    size = sum(file.stat().st_size for file in [*weights, *others] if file.is_file())
    return size, sum(_tensor_bytes(file) for file in weights), model_identity(folder)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Saving for the sake of its size is not what the user waits for."""
    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers.utils.logging.enable_progress_bar()


def _tensor_bytes(file: Path) -> int:
    """Sum of the tensors of a safetensors file, from its header."""
    header, _ = read_header(file)
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return sum(end - start for start, end in offsets)


def _forwards(models: Sequence[PreTrainedModel], batches: Sequence[dict[str, Tensor]]) -> list[Callable[[], None]]:
    def forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            model(**batch)
        synchronize(model.device)

    return [lambda m=model, b=batch: forward(m, b) for model, batch in zip(models, batches, strict=True)]


def _peak_memory_bytes(model: PreTrainedModel, batch: dict[str, Tensor]) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + peak_allocated_bytes(_forwards([model], [batch])[0], model.device)


@contextmanager
def evaluating(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """All models in eval mode while open."""
    training = [[module for module in model.modules() if module.training] for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for modules in training:
            for module in modules:
                module.training = True


def device_name(device: torch.device) -> str:
    """What the machine calls it, such as "NVIDIA H100 80GB HBM3" or "AMD EPYC (CPU)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} (CPU)"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "hf_compress": __version__,
    }
