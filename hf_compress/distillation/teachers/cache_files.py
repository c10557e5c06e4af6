"""The files of a teacher cache: shards of tensors, each written beside and renamed, and a manifest that names them.

`teacher_cache.json` says whose outputs these are, what is stored, and the length and SHA-256 of every shard. While a
run is writing, each finished shard has a note of its own beside it; the notes become part of the manifest at the end,
and tell a run that goes on what is there.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_compress.distillation.teachers.manifest import check_manifest, is_shard
from hf_compress.files.store import Store, is_remote
from hf_compress.files.whole import file_digest, write_whole
from hf_compress.training.ranks import failing_together

logger = logging.getLogger(__name__)

MANIFEST = "teacher_cache.json"
VERSION = 1
SETTINGS = ("teacher", "tokenizer", "inputs", "top_k", "draws", "hidden_states", "dtype")
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation")


def is_cache(path) -> bool:
    """Whether `path` is a folder, or an address of fsspec, that holds a teacher cache, finished or not."""
    if isinstance(path, str) and is_remote(path):
        return Store(path).read(MANIFEST) is not None
    return isinstance(path, str | os.PathLike) and (Path(path) / MANIFEST).is_file()


@contextmanager
def only_writer(path: Path, state: PartialState) -> Iterator[None]:
    """Wait until no other job writes to `path`. A lock of the system: a killed process leaves none behind."""
    with ExitStack() as held:
        with failing_together():
            if state.is_main_process:
                path.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path / ".lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    logger.warning("Another process writes the cache in %s: waiting for it to finish.", path)
                    lock.acquire()
                held.callback(lock.release)
        yield


def read_manifest(folder: Path | str) -> dict:
    file, content = f"{folder}/{MANIFEST}", Store(folder).read(MANIFEST)
    if content is None:
        raise ValueError(
            f"There is no teacher cache at {folder}: {MANIFEST} is missing. Write one with hfc.cache_teacher(teacher, "
            "dataset, path)."
        )
    try:
        manifest = json.loads(content)
        version = manifest.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). Delete the folder and write the cache again.") from error
    if version != VERSION:
        raise ValueError(
            f"{file} has version {version}, but this hf_compress reads version {VERSION}. Write the cache again with "
            "hfc.cache_teacher."
        )
    manifest.setdefault("draws", None)  # which earlier caches do not name
    check_manifest(file, manifest)
    return manifest


def write_manifest(folder: Path | str, manifest: dict) -> None:
    Store(folder).write(MANIFEST, json.dumps({"version": VERSION, **manifest}, indent=2).encode())


def packed_shard(tensors: dict[str, Tensor]) -> tuple[str, bytes, dict]:
    """A shard's name, by its content; its content; and its entry in the manifest."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    entry = {"size_bytes": len(data), "sha256": digest, "examples": len(tensors["keys"])}
    return f"shard-{digest[:16]}.safetensors", data, entry


def write_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard, and the note that it is whole."""
    name, data, entry = packed_shard(tensors)
    write_whole(folder / name, data)
    write_whole(folder / f"{name}.json", json.dumps(entry))


def read_notes(folder: Path) -> dict[str, dict]:
    """The shards that were written since the manifest: name -> entry."""
    found = {}
    for note in sorted(folder.glob("shard-*.safetensors.json")):
        try:
            entry = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            entry = None
        if is_shard(note.name.removesuffix(".json"), entry):
            found[note.name.removesuffix(".json")] = entry
        else:
            logger.warning("Passing over %s: it is no note of a shard.", note)
    return found


def remove_notes(folder: Path) -> None:
    for note in folder.glob("shard-*.safetensors.json"):
        note.unlink()


def find_faults(folder: Path | str, shards: dict[str, dict]) -> dict[str, str]:
    """What is wrong with the shards, by length and, on this machine, hash: name -> fault, in words.

    Far shards are hashed when they are fetched.
    """
    store = Store(folder)
    sizes = store.sizes()

    def fault(name: str) -> str | None:
        size, entry = sizes.get(name), shards[name]
        if size is None:
            return "is missing"
        if size != entry["size_bytes"]:
            return f"has {size} bytes where the manifest says {entry['size_bytes']}"
        if store.folder is not None and (found := file_digest(store.folder / name)) != entry["sha256"]:
            return f"was altered: its SHA-256 is {found[:16]}... where the manifest says {entry['sha256'][:16]}..."
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = dict(zip(shards, pool.map(fault, shards), strict=True))
    return {name: fault for name, fault in faults.items() if fault is not None}


def teacher_fingerprint(teacher: nn.Module) -> str:
    """SHA-256 over what decides a teacher's outputs: its config, every tensor of its state, and the active adapters."""
    digest = hashlib.sha256()
    if hasattr(teacher, "peft_config"):
        digest.update(str(sorted(teacher.active_adapters)).encode())
    digest.update(str(getattr(teacher, "adapter", None)).encode())
    config = getattr(teacher, "config", None)
    if isinstance(config, PretrainedConfig):
        digest.update(json.dumps(plain_config(config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        if not isinstance(tensor, Tensor):  # a note of the quantizer's
            digest.update(f"{name} {tensor}".encode())
            continue
        if tensor.is_meta:
            raise ValueError(
                f"The teacher's {name} has no weights in memory (it is offloaded to disk), so the cache cannot be told "
                "from another teacher's. Load the teacher without offloading to disk."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_config(config: PretrainedConfig) -> dict:
    """The config as JSON holds it, without what changes from one load to the next."""
    return {name: value for name, value in config.to_dict().items() if name not in VOLATILE}


def tokenizer_fingerprint(tokenizer) -> str | None:
    """SHA-256 over the tokens and their numbers; None for what is no tokenizer. Other rules give other numbers."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def settings_of(manifest: dict) -> dict[str, Any]:
    """What all that write one cache have to have alike: name -> value."""
    return {name: manifest[name] for name in SETTINGS} | {"teacher": manifest["teacher"]["fingerprint"][:16]}


def check_same_cache(folder: Path | str, found: dict, manifest: dict) -> None:
    """Raise ValueError where the cache in `folder` is of another teacher or was written with other settings."""
    check_settings(folder, settings_of(found), settings_of(manifest), SETTINGS)


def check_settings(folder: Path, found: dict, expected: dict, names: Iterable[str]) -> None:
    """Raise ValueError where a cache in `folder` was written with other settings than are asked for now."""
    for name in names:
        if found[name] != expected[name]:
            raise ValueError(
                f"The cache in {folder} belongs to another {name}: it has {found[name]!r}, now it is "
                f"{expected[name]!r}. Choose another folder, or delete this one."
            )


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor after the other, also under a caller's autocast, which refuses to join float16 on a CPU."""
    with torch.autocast("cpu", enabled=False):
        return torch.cat(list(tensors))
