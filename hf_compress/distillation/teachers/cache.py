"""Runs a teacher once over a dataset and keeps its outputs on disk, for every student and epoch to come."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PretrainedConfig, default_data_collator

from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.teachers.apart import Leases, Parts, sum_of, worker_here, write_parts
from hf_compress.distillation.teachers.cache_contents import Outputs, Rows, together
from hf_compress.distillation.teachers.cache_files import (
    check_same_cache,
    find_faults,
    is_cache,
    only_writer,
    plain_config,
    read_manifest,
    read_notes,
    remove_notes,
    settings_of,
    teacher_fingerprint,
    tokenizer_fingerprint,
    write_manifest,
    write_shard,
)
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.example_keys import example_keys
from hf_compress.distillation.teachers.teacher import check_tokens
from hf_compress.files.store import Store, is_remote
from hf_compress.files.whole import remove_leftovers
from hf_compress.model.reading import PaddingCollator
from hf_compress.model.tasks import plain_model
from hf_compress.model.unfinished import check_weights
from hf_compress.training.progress import progress_bar
from hf_compress.training.ranks import check_same, failing_together

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20  # a shard is held in memory while it grows
ROWS_AT_ONCE = 1024  # read, sorted by length and spread over the ranks together


def cache_teacher(
    teacher: nn.Module,
    dataset: Sequence | IterableDataset,
    path: str | Path,
    *,
    top_k: int | None = None,
    draws: int | None = None,
    hidden_states: Iterable[int] = (),
    dtype: torch.dtype = torch.float32,
    processing_class=None,
    data_collator: Callable[[list], dict] | None = None,
    batch_size: int = 32,
    shard_size: int = 8192,
    worker: tuple[int, int] | Literal["env"] | None = None,
    lease_seconds: float = 600,
) -> CachedTeacher:
    """Write the teacher's outputs for each example of `dataset` to `path`, and return them as a teacher.

    Each example is found again by a hash of its model inputs, so shuffling, batching and padding change nothing. Called
    again, it adds the examples that are missing and goes on after a stop; examples that are there are not computed
    again. Under `accelerate launch` the ranks share the work. The teacher runs in eval mode, without dropout.

    Workers that were started apart share it, too, one shard at a time: see `worker`. What they write is all of one
    dataset, in its order; more is added by a call without.

    Args:
        dataset: what `Trainer` takes as train_dataset. A stream is written as by workers.
        path: a folder; or an address of fsspec (`s3://...`), written to as by workers.
        top_k: keep the largest logits of each prediction and the mass of the others, for vocabularies; all by default.
        draws: keep, for vocabularies, the classes that as many draws from each prediction at temperature 1 give, 1 to
            255, and the entropy: at most 3 bytes for each different class among them (up to 2^24 / draws classes, else
            4), and 3 for a token. Without bias, see `teachers/draws.py`; `bytes_per_token` of the result says the sum.
        hidden_states: which hidden states to keep as well; 0 is the embedding.
        dtype: of the logits and hidden states on disk; torch.float16 halves them and rounds to 3 digits.
        processing_class: the tokenizer, whose vocabulary the trainer's is compared with; pads, where data_collator is
            not given.
        data_collator: as the trainer's. It must not change the inputs at random.
        batch_size: examples a forward of the teacher.
        shard_size: examples a file; what a stopped run, or a worker that dies, may lose.
        worker: the number of this worker and how many there are; "env" for what torchrun or Slurm says (the default
            for streams and addresses). All have the same dataset and settings; they may come and go.
        lease_seconds: another worker takes over a shard whose worker has written no sign of life for so long. More
            than a batch takes.

    Raises ValueError for a top_k larger than the number of classes, draws from what is no prediction for each token,
    hidden states that are not there, values that `dtype` cannot hold, and a cache in `path` that belongs to another
    teacher, tokenizer or setting.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"cache_teacher takes a model, got {type(teacher).__name__}: load it first.")
    check_weights(teacher, "cache_teacher")
    if isinstance(config := getattr(plain_model(teacher), "config", None), PretrainedConfig):
        check_tokens(config, processing_class)
    if min(batch_size, shard_size) < 1:
        raise ValueError(f"batch_size and shard_size count examples, 1 or more, got {batch_size} and {shard_size}.")
    is_apart = worker is not None or is_remote(path) or isinstance(dataset, IterableDataset)
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = None if is_apart else PartialState(cpu=cpu)  # which brings the ranks together
    if not getattr(teacher, "is_quantized", False) and not hasattr(teacher, "hf_device_map"):
        teacher.to(_own_device(cpu=cpu) if is_apart else state.device)
    collate = data_collator or (
        PaddingCollator(processing_class) if hasattr(processing_class, "pad_token_id") else default_data_collator
    )
    rows, outputs = Rows(dataset, teacher, collate), Outputs(teacher, top_k, draws, hidden_states, dtype)
    with _evaluating(teacher):
        if not (first := rows.first(batch_size)):
            raise ValueError("The dataset is empty: expected at least one example. Was everything filtered out?")
        outputs.look_at(rows.batch(first), rows.batch(first))
        manifest = {
            "teacher": _description(teacher),
            "tokenizer": tokenizer_fingerprint(processing_class),
            "inputs": outputs.columns,
            "top_k": top_k,
            "draws": draws,
            "hidden_states": outputs.hidden_states,
            "dtype": str(dtype).removeprefix("torch."),
            "num_hidden_states": num_hidden_states(teacher) if outputs.hidden_states else None,
            "classes": outputs.classes,
            "stored": outputs.stored,
        }
        keys = example_keys(rows.batch(first), outputs.columns)
        if is_apart:
            worker = worker_here() if worker in (None, "env") else worker
            leases = Leases(Store(path), lease_seconds)
            parts = Parts(rows, shard_size, keys=keys)
            write_parts(leases, manifest, outputs, parts, worker=worker, batch_size=batch_size)
        else:
            text = f"{len(rows)} examples, of which the first add up to {sum_of(keys)}"
            check_same({**settings_of(manifest), "shard_size": shard_size, "dataset": text}, "A teacher cache")
            _write_together(Path(path), manifest, outputs, rows, batch_size, shard_size, state)
    return CachedTeacher(path)


def _write_together(
    path: Path, manifest: dict, outputs: Outputs, rows: Rows, batch_size: int, shard_size: int, state: PartialState
) -> None:
    """All ranks of one job, while no other job writes."""
    with only_writer(path, state):
        shards = _open(path, manifest, state)
        known = set()
        for name in shards:
            known.update(load_file(path / name)["keys"].tolist())
        with failing_together():
            for tensors in _missing(outputs, rows, known, batch_size, shard_size, state):
                write_shard(path, tensors)
        with failing_together():
            if state.is_main_process:
                write_manifest(path, {**manifest, "is_complete": True, "shards": {**shards, **read_notes(path)}})
                remove_notes(path)
    state.wait_for_everyone()


def _own_device(*, cpu: bool) -> torch.device:
    """The accelerator of this process among those of its machine."""
    return (
        torch.device("cpu")
        if cpu
        else torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))
    )


def _open(path: Path, manifest: dict, state: PartialState) -> dict[str, dict]:
    """Begin a cache, or go on with the one that is there: its whole shards."""
    with failing_together():  # all ranks have looked before one writes
        shards, faults = _whole_shards(path, manifest) if is_cache(path) else ({}, {})
    with failing_together():
        if state.is_main_process:
            path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            for name in faults:
                (path / name).unlink(missing_ok=True)
            write_manifest(path, {**manifest, "is_complete": False, "shards": shards})
            remove_notes(path)
    return shards


def _whole_shards(path: Path, manifest: dict) -> tuple[dict[str, dict], dict[str, str]]:
    """The shards of the cache that is there and can be gone on with, and what is wrong with others, by name."""
    found = read_manifest(path)
    check_same_cache(path, found, manifest)
    if "text" in found and not found["is_complete"]:
        raise ValueError(
            f"Workers that were started apart write the cache in {path}. Finish it with worker='env' or (0, 1) and "
            "the same dataset and shard_size, or choose another folder."
        )
    shards = {**found["shards"], **read_notes(path)}
    faults = find_faults(path, shards)
    for name, fault in faults.items():
        logger.warning("Writing %s again: it %s.", path / name, fault)
    return {name: entry for name, entry in shards.items() if name not in faults}, faults


def _missing(
    outputs: Outputs, rows: Rows, known: set[int], batch_size: int, shard_size: int, state: PartialState
) -> Iterator[dict[str, Tensor]]:
    """Shards with this rank's part of the examples that are not `known` yet."""
    chunk = min(ROWS_AT_ONCE, -(-len(rows) // state.num_processes))
    held: list[dict[str, Tensor]] = []
    with progress_bar(total=len(rows), desc="Running the teacher", unit="text") as progress:
        for start in range(state.process_index * chunk, len(rows), state.num_processes * chunk):
            examples = rows.read(range(start, min(start + chunk, len(rows))))
            for tensors in outputs.batches(rows, examples, known, batch_size):
                held.append(tensors)
                size = sum(t.numel() * t.element_size() for tensors in held for t in tensors.values())
                if size >= SHARD_BYTES or sum(len(tensors["keys"]) for tensors in held) >= shard_size:
                    yield together(held)
                    held = []
            progress.update(min(chunk * state.num_processes, len(rows) - progress.n))
    if held:
        yield together(held)


def _description(teacher: nn.Module) -> dict:
    model = plain_model(teacher)
    config = getattr(model, "config", None)
    plain = json.loads(json.dumps(plain_config(config), default=str)) if isinstance(config, PretrainedConfig) else None
    return {"fingerprint": teacher_fingerprint(teacher), "class": type(model).__name__, "config": plain}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode while open: no dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
