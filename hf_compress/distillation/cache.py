"""Runs a teacher once over a dataset and keeps its outputs on disk, for every student and epoch to come."""

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PretrainedConfig, default_data_collator
from transformers.utils import find_labels

from hf_compress.anatomy import anatomy
from hf_compress.capture import capture
from hf_compress.distillation.cache_files import (
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
from hf_compress.distillation.cached_teacher import CachedTeacher
from hf_compress.distillation.example_keys import MASKS, Side, example_keys, real_tokens
from hf_compress.distillation.layer_map import num_hidden_states
from hf_compress.distillation.tasks import Task, plain_model
from hf_compress.inputs import forward_names

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20  # a shard is held in memory while it grows
ROWS_AT_ONCE = 1024  # read, sorted by length and spread over the ranks together
LABELS = ("label", "label_ids", "labels")
SETTINGS = ("teacher", "tokenizer", "inputs", "top_k", "hidden_states", "dtype")


def cache_teacher(
    teacher: nn.Module,
    dataset: Sequence,
    path: str | Path,
    *,
    top_k: int | None = None,
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
        hidden_states: which hidden states to keep as well; 0 is the embedding.
        dtype: of the logits and hidden states on disk; torch.float16 halves them and rounds to 3 digits.
        processing_class: the tokenizer, whose vocabulary the trainer's is compared with; pads, where data_collator is
            not given.
        data_collator: as the trainer's. It must not change the inputs at random.
        batch_size: examples a forward of the teacher.
        shard_size: examples a file; what a stopped run may lose.

    Raises ValueError for a top_k larger than the number of classes, hidden states that are not there, values that
    `dtype` cannot hold, and a cache in `path` that belongs to another teacher, tokenizer or setting.
    """
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    path, state = Path(path), PartialState(cpu=cpu)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: expected at least one example. Was everything filtered out?")
    if not getattr(teacher, "is_quantized", False) and not hasattr(teacher, "hf_device_map"):
        teacher.to(state.device)
    collate = data_collator or (
        DataCollatorWithPadding(processing_class) if hasattr(processing_class, "pad") else default_data_collator
    )
    rows, outputs = _Rows(dataset, teacher, collate), _Outputs(teacher, top_k, hidden_states, dtype)
    with _evaluating(teacher):
        first = [rows.batch(rows.read(range(min(batch_size, len(dataset))))) for _ in range(2)]
        outputs.look_at(*first)
        manifest = {
            "teacher": _description(teacher),
            "tokenizer": tokenizer_fingerprint(processing_class),
            "inputs": outputs.columns,
            "top_k": top_k,
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
        for torn in [*path.glob(".shard-*"), *(path / name for name in faults)]:
            torn.unlink(missing_ok=True)
        write_manifest(path, {**manifest, "is_complete": False, "shards": shards})
        remove_notes(path)
    state.wait_for_everyone()
    return shards


class _Rows:
    """The examples of a dataset as batches of what the teacher reads, labels included, as a trainer makes them."""

    def __init__(self, dataset: Sequence, teacher: nn.Module, collate: Callable[[list], dict]):
        model = plain_model(teacher)
        self.wanted = {*inspect.signature(model.forward).parameters, *LABELS, *find_labels(type(model))}
        if hasattr(dataset, "column_names"):
            dataset = dataset.select_columns([name for name in dataset.column_names if name in self.wanted])
        self.dataset, self.teacher, self.collate = dataset, model, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, numbers: Iterable[int]) -> list:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(list(numbers))
        rows = [self.dataset[i] for i in numbers]
        return [{k: v for k, v in r.items() if k in self.wanted} if isinstance(r, dict) else r for r in rows]

    def batch(self, rows: list) -> dict[str, Tensor]:
        batch = dict(self.collate(rows))
        if "decoder_input_ids" not in batch and "labels" in batch and self.teacher_has_decoder:
            batch["decoder_input_ids"] = self.teacher.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch

    @property
    def teacher_has_decoder(self) -> bool:
        return getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False)


class _Outputs:
    """What is kept of the teacher's outputs: tensors with one row an example, or one row a real token."""

    def __init__(self, teacher: nn.Module, top_k: int | None, hidden_states: Iterable[int], dtype: torch.dtype):
        self.teacher, self.top_k, self.dtype, self.task = teacher, top_k, dtype, Task.of(teacher)
        self.hidden_states = sorted({_numbered(n, teacher) for n in hidden_states})
        self.stored: dict[str, Side] = {}

    def look_at(self, batch: dict[str, Tensor], again: dict[str, Tensor]) -> None:
        """Learn from a batch, collated twice, which inputs tell examples apart and what there is to store."""
        labels = {*LABELS, *find_labels(type(plain_model(self.teacher)))}
        names = forward_names(plain_model(self.teacher)) - labels - set(MASKS)
        self.columns = sorted(name for name, value in batch.items() if name in names and isinstance(value, Tensor))
        if not self.columns:
            raise ValueError(
                f"The teacher reads {sorted(names)}, but the batches have {sorted(batch)}. Tokenize the dataset first."
            )
        if not torch.equal(example_keys(batch, self.columns), example_keys(again, self.columns)):
            raise ValueError(
                "The data_collator gives the same examples other inputs each time (does it mask at random?), so none "
                "would be found again. Change the inputs once, in the dataset, or use a live teacher."
            )
        outputs, states = self._run(batch)
        per_token: Side = "decoder" if "decoder_input_ids" in batch else "input"
        names = ["start_logits", "end_logits"] if self.task.kind == "spans" else ["logits"]
        self.classes = outputs[names[0]].shape[-1]
        if self.top_k is not None and (self.task.kind == "spans" or not 1 <= self.top_k <= self.classes):
            what = "spans, whose logits are positions" if self.task.kind == "spans" else f"{self.classes} classes"
            raise ValueError(
                f"top_k must lie between 1 and the number of classes: got top_k={self.top_k} for {what}. Leave top_k "
                "out to keep all logits."
            )
        names = ["top_logits", "top_indices", "rest"] if self.top_k else names
        self.stored = {name: "example" if self.task.kind == "sequence" else per_token for name in names}
        first_decoder_state = _num_encoder_states(self.teacher) if self.hidden_states else 0
        for number in states:
            side: Side = "decoder" if number >= first_decoder_state else "input"
            self.stored[f"hidden_states.{number}"] = side if real_tokens(batch, side) is not None else "example"

    @torch.no_grad()
    def _run(self, batch: dict[str, Tensor]) -> tuple[Mapping, dict[int, Tensor]]:
        device = next((p.device for p in self.teacher.parameters()), torch.device("cpu"))
        inputs = {name: batch[name].to(device) for name in [*self.columns, *(m for m in MASKS if m in batch)]}
        inputs = {
            k: v for k, v in inputs.items() if k in inspect.signature(plain_model(self.teacher).forward).parameters
        }
        if getattr(getattr(plain_model(self.teacher), "config", None), "use_cache", False):
            inputs["use_cache"] = False
        with capture(self.teacher, hidden_states=self.hidden_states) as signals:
            return self.teacher(**inputs), signals.hidden_states

    def of(self, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """The tensors of a shard for one batch."""
        outputs, states = self._run(batch)
        values = {f"hidden_states.{n}": states[n] for n in self.hidden_states}
        if self.top_k:
            logits = outputs["logits"].float()
            top, indices = logits.topk(self.top_k, dim=-1)
            rest = logits.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
            values |= {"top_logits": top, "top_indices": indices.int(), "rest": rest}
        else:
            values |= {name: outputs[name] for name in self.stored if name not in values}
        tensors = {"keys": keys.cpu()}
        for side in ("input", "decoder"):
            if side in self.stored.values():
                tensors[f"{side}_lengths"] = real_tokens(batch, side).sum(dim=1).cpu()
        for name, side in self.stored.items():
            value = (
                values[name] if side == "example" else values[name][real_tokens(batch, side).to(values[name].device)]
            )
            tensors[name] = value.cpu() if name in ("top_indices", "rest") else self._rounded(name, value.cpu())
        return tensors

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        rounded = value.to(self.dtype)
        if not torch.equal(rounded.isfinite(), value.isfinite()):
            largest = value[value.isfinite()].abs().max().item()
            raise ValueError(
                f"dtype={self.dtype} cannot hold the teacher's {name}: it goes up to {largest:.3g}, and that type to "
                f"{torch.finfo(self.dtype).max:.3g}. Use dtype=torch.float32 or torch.bfloat16."
            )
        return rounded


def _missing(
    outputs: _Outputs, rows: _Rows, known: set[int], batch_size: int, shard_size: int, state: PartialState
) -> Iterator[dict[str, Tensor]]:
    """Shards with this rank's part of the examples that are not `known` yet."""
    chunk = min(ROWS_AT_ONCE, -(-len(rows) // state.num_processes))
    held: list[dict[str, Tensor]] = []
    with tqdm(total=len(rows), desc="Caching the teacher", disable=not state.is_main_process) as progress:
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


def _numbered(state: int, teacher: nn.Module) -> int:
    count = num_hidden_states(teacher)
    if not -count <= state < count:
        raise ValueError(f"hidden_states are 0 (the embedding) to {count - 1} in this teacher, got {state}.")
    return state % count


def _num_encoder_states(teacher: nn.Module) -> int:
    """The number of the decoder's first hidden state, where there is an encoder before it; else beyond the last."""
    stacks = anatomy(teacher).stacks
    return len(stacks[0].layers) + 1 if len(stacks) > 1 else num_hidden_states(teacher)


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
