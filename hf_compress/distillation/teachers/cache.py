"""Runs a teacher once over a dataset and keeps its outputs on disk, for every student and epoch to come."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, default_data_collator

from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.teachers.cache_contents import Outputs, Rows
from hf_compress.distillation.teachers.cache_files import (
    check_settings,
    find_faults,
    is_cache,
    joined,
    only_writer,
    plain_config,
    read_manifest,
    read_notes,
    remove_notes,
    teacher_fingerprint,
    tokenizer_fingerprint,
    write_manifest,
    write_shard,
)
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.example_keys import example_keys
from hf_compress.files.whole import remove_leftovers
from hf_compress.model.reading import PaddingCollator
from hf_compress.model.tasks import plain_model
from hf_compress.training.progress import progress_bar

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20  # a shard is held in memory while it grows
ROWS_AT_ONCE = 1024  # read, sorted by length and spread over the ranks together
SETTINGS = ("teacher", "tokenizer", "inputs", "top_k", "draws", "hidden_states", "dtype")


def cache_teacher(
    teacher: nn.Module,
    dataset: Sequence,
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
) -> CachedTeacher:
    """Write the teacher's outputs for each example of `dataset` to `path`, and return them as a teacher.

    Each example is found again by a hash of its model inputs, so shuffling, batching and padding change nothing. Called
    again, it adds the examples that are missing and goes on after a stop; examples that are there are not computed
    again. Under `accelerate launch` the ranks share the work. The teacher runs in eval mode, without dropout.

    Args:
        dataset: what `Trainer` takes as train_dataset, with a length.
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
        shard_size: examples a file; what a stopped run may lose.

    Raises ValueError for a top_k larger than the number of classes, draws from what is no prediction for each token,
    hidden states that are not there, values that `dtype` cannot hold, and a cache in `path` that belongs to another
    teacher, tokenizer or setting.
    """
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    path, state = Path(path), PartialState(cpu=cpu)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: expected at least one example. Was everything filtered out?")
    if not getattr(teacher, "is_quantized", False) and not hasattr(teacher, "hf_device_map"):
        teacher.to(state.device)
    collate = data_collator or (
        PaddingCollator(processing_class) if hasattr(processing_class, "pad_token_id") else default_data_collator
    )
    rows, outputs = Rows(dataset, teacher, collate), Outputs(teacher, top_k, draws, hidden_states, dtype)
    with _evaluating(teacher):
        first = [rows.batch(rows.read(range(min(batch_size, len(dataset))))) for _ in range(2)]
        outputs.look_at(*first)
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
        with only_writer(path, state):
            shards = _open(path, manifest, state)
            known = set()
            for name in shards:
                known.update(load_file(path / name)["keys"].tolist())
            for tensors in _missing(outputs, rows, known, batch_size, shard_size, state):
                write_shard(path, tensors)
            state.wait_for_everyone()
            if state.is_main_process:
                write_manifest(path, {**manifest, "is_complete": True, "shards": {**shards, **read_notes(path)}})
                remove_notes(path)
    state.wait_for_everyone()
    return CachedTeacher(path)


def _open(path: Path, manifest: dict, state: PartialState) -> dict[str, dict]:
    """Begin a cache, or go on with the one that is there: its whole shards."""
    shards, faults = {}, {}
    is_there = is_cache(path)
    state.wait_for_everyone()  # all ranks have looked before one writes
    if is_there:
        found = read_manifest(path)
        theirs, mine = ({**m, "teacher": m["teacher"]["fingerprint"][:16]} for m in (found, manifest))
        check_settings(path, theirs, mine, SETTINGS)
        shards = {**found["shards"], **read_notes(path)}
        faults = find_faults(path, shards)
        for name, fault in faults.items():
            logger.warning("Writing %s again: it %s.", path / name, fault)
        shards = {name: entry for name, entry in shards.items() if name not in faults}
    state.wait_for_everyone()
    if state.is_main_process:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        for name in faults:
            (path / name).unlink(missing_ok=True)
        write_manifest(path, {**manifest, "is_complete": False, "shards": shards})
        remove_notes(path)
    state.wait_for_everyone()
    return shards


def _missing(
    outputs: Outputs, rows: Rows, known: set[int], batch_size: int, shard_size: int, state: PartialState
) -> Iterator[dict[str, Tensor]]:
    """Shards with this rank's part of the examples that are not `known` yet."""
    chunk = min(ROWS_AT_ONCE, -(-len(rows) // state.num_processes))
    held: list[dict[str, Tensor]] = []
    with progress_bar(total=len(rows), desc="Running the teacher", unit="text") as progress:
        for start in range(state.process_index * chunk, len(rows), state.num_processes * chunk):
            examples = rows.read(range(start, min(start + chunk, len(rows))))
            examples.sort(key=_length)  # little padding
            for first in range(0, len(examples), batch_size):
                batch = rows.batch(examples[first : first + batch_size])
                keys = example_keys(batch, outputs.columns)
                new = [i for i, key in enumerate(keys.tolist()) if not (key in known or known.add(key))]
                if new:
                    batch = {k: v[new] for k, v in batch.items() if isinstance(v, Tensor) and len(v) == len(keys)}
                    held.append(outputs.of(batch, keys[new]))
                size = sum(t.numel() * t.element_size() for tensors in held for t in tensors.values())
                if size >= SHARD_BYTES or sum(len(tensors["keys"]) for tensors in held) >= shard_size:
                    yield _joined(held)
                    held = []
            progress.update(min(chunk * state.num_processes, len(rows) - progress.n))
    if held:
        yield _joined(held)


def _joined(held: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: joined([tensors[name] for tensors in held]) for name in held[0]}


def _length(row) -> int:
    tokens = row.get("input_ids") if isinstance(row, dict) else None
    return 0 if tokens is None else len(tokens)


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
