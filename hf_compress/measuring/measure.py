"""Size and speed of one model, or of several that take turns."""

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_compress.checkpoint.opening import check_source, open_model
from hf_compress.engines import processor
from hf_compress.formats.runtimes.opened import exported_format, open_exported, runner, runtime_of, skeleton
from hf_compress.layers.packed_module import routes_of
from hf_compress.measuring.counting import multiply_adds, num_parameters, sparsity
from hf_compress.measuring.decoding import DECODED, prompt_of, write
from hf_compress.measuring.isolated import How, Worker
from hf_compress.measuring.measurement import PYTORCH, Measurement
from hf_compress.measuring.stored import stored_size
from hf_compress.measuring.timing import Spread, peak_allocated_bytes, steady_seconds, synchronize
from hf_compress.measuring.turns import DECODING, KINDS, LATENCY_BATCH, measure_in_turns
from hf_compress.model.inputs import THROUGHPUT_BATCH, example_batch
from hf_compress.model.pooling import makes_vectors
from hf_compress.model.unfinished import check_weights
from hf_compress.version import __version__

logger = logging.getLogger(__name__)

Source = PreTrainedModel | str | Path


class Local:
    """A model of this process. Its forwards are timed by `clock`, which gives seconds."""

    def __init__(self, model: PreTrainedModel, how: How, *, folder: Path | None = None,
                 clock: Callable[[], float] = time.perf_counter):  # fmt: skip
        self.model, self.folder, self.clock = model, folder, clock
        whole = example_batch(model, sequence_length=how.sequence_length, inputs=how.inputs)
        self.batches = {kind: {name: value[:rows] for name, value in whole.items()} for kind, rows in KINDS.items()}
        self.prompt = prompt_of(model, self.batches["single"]) if runtime_of(model) is None else None

    def cost(self) -> Measurement:
        runtime, single = runtime_of(self.model), self.batches["single"]
        counted = self.model if runtime is None else skeleton(runtime.folder)
        parameters = num_parameters(counted)
        stored_bytes, tensor_bytes, identity = stored_size(self.model, self.folder)
        length = single["input_ids"].shape[-1] if "input_ids" in single else None
        return Measurement(
            parameters=parameters,
            stored_bytes=stored_bytes,
            bits_per_weight=8 * tensor_bytes / parameters,
            sparsity=sparsity(self.model) if runtime is None else {},
            multiply_adds=multiply_adds(counted, single),
            latency_ms=Spread.of([1e3 * self.seconds("single")]),
            throughput=Spread.of([THROUGHPUT_BATCH / self.seconds("batch")]),
            peak_memory_bytes=self._peak_memory_bytes() if runtime is None else None,
            sequence_length=length,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=device_name(self.model.device),
            threads=torch.get_num_threads(),
            cpu_mode=processor.mode(),
            routes=routes_of(self.model) if runtime is None else {},
            versions=versions(),
            identity=identity,
            runtime=PYTORCH if runtime is None else runtime.name,
            decoding=None if self.prompt is None else Spread.of([DECODED / self.seconds(DECODING)]),
        )

    def seconds(self, kind: str) -> float:
        once = partial(self._forward, kind)
        if kind in KINDS:
            return steady_seconds(once, clock=self.clock)
        start = self.clock()
        once()
        return self.clock() - start

    def _forward(self, kind: str) -> None:
        if kind == DECODING:
            write(self.model, self.prompt)
        else:
            with torch.inference_mode():
                self.model(**self.batches[kind])
        synchronize(self.model.device)

    def _peak_memory_bytes(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) + peak_allocated_bytes(lambda: self._forward("batch"), self.model.device)


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
    """Measure a model, a folder that holds one, an exported folder, or a model of the Hub.

    model            a given model is measured where it is and as it is; a folder or name is loaded first. What
                     `hfc.export` wrote for OpenVINO or ONNX Runtime runs there, on the CPU, in a process of its own
    sequence_length  of the random tokens that the model is run on
    inputs           real examples instead: tensors (B, T) as a tokenizer returns them; rows repeat to fill 32
    dtype, device    for a model that is loaded here; as stored, and the accelerator if there is one, by default

    Raises ValueError when the folder holds no model or the inputs do not fit it, ImportError for a runtime that is not
    installed.
    """
    loaded = model if is_exported(model) else load_model(model, dtype=dtype, device=device)
    rounds = {"latency_rounds": latency_rounds, "throughput_rounds": throughput_rounds}
    return measure_sources([model], [loaded], How(sequence_length, inputs, dtype, device), **rounds)[0]


def measure_sources(
    sources: Sequence[Source],
    models: Sequence[Source],
    how: How,
    *,
    latency_rounds: int = 50,
    throughput_rounds: int = 10,
    isolate: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure several models in turns: `models[i]` was loaded from `sources[i]`, whose files are its size.

    Exported folders, and with `isolate` all, are measured in processes of their own, with as many threads as this one.
    Sources that are models are saved to a temporary folder. `clock` gives seconds, here. Raises RuntimeError if a
    process ends early; what it said stands in the error stream.
    """
    apart = [isolate or is_exported(source) for source in sources]
    for source in (source for source in sources if is_exported(source)):
        check_exported(source, how.dtype, how.device)
    local = [model for model, is_apart in zip(models, apart, strict=True) if not is_apart]
    with ExitStack() as stack:
        stack.enter_context(evaluating(local))
        subjects = [
            stack.enter_context(Worker(source, how))
            if is_apart
            else Local(model, how, folder=local_folder(source), clock=clock)
            for source, model, is_apart in zip(sources, models, apart, strict=True)
        ]
        logger.info("timing %d models at batch %d and %d", len(models), LATENCY_BATCH, THROUGHPUT_BATCH)
        return measure_in_turns(subjects, latency_rounds=latency_rounds, throughput_rounds=throughput_rounds)


def is_exported(source: Source) -> bool:
    """Whether `source` is a folder that a runtime runs."""
    folder = local_folder(source)
    return folder is not None and exported_format(folder) is not None


def check_exported(folder: Source, dtype: torch.dtype | None, device: str | None) -> None:
    """Raise for an export that cannot run here, and for what cannot be asked of it: it runs as it was written."""
    if dtype not in (None, torch.float32) or torch.device(device or "cpu").type != "cpu":
        raise ValueError(
            f"{folder} is an export: it runs on the CPU and in float32 outside of its integers, got {device=} and "
            f"{dtype=}. Leave both out."
        )
    runner(Path(folder))


def load_model(source: Source, *, dtype: torch.dtype | None = None, device: str | None = None) -> PreTrainedModel:
    """The model itself if it is one; else loaded as the class that its config names, in eval mode.

    An embedder of sentence-transformers is loaded without the head that its config may name: its files have none. Of
    an exported folder it has empty modules, and a forward that the runtime runs.
    """
    if isinstance(source, PreTrainedModel):
        check_weights(source, "A forward")
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a Transformers model, a folder or a Hub name, got {type(source).__name__}.")
    path = Path(source)
    if is_exported(source):
        check_exported(source, dtype, device)
        return open_exported(path)
    check_source(source)
    config = AutoConfig.from_pretrained(source)
    name = "AutoModel" if makes_vectors(source) else (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"The config of {source} names the class {name}, which Transformers does not have.")
    model = open_model(model_class, source, dtype=dtype or "auto")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device)


def local_folder(source: Source) -> Path | None:
    """The folder that `source` names, None for a model or a name of the Hub."""
    return Path(source) if isinstance(source, (str, Path)) and Path(source).is_dir() else None


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
    """What the machine calls it, such as "NVIDIA H100 80GB HBM3" or "AMD EPYC with AVX512-BF16 (CPU)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{processor.name()} (CPU)"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "hf_compress": __version__,
    }
