"""What a teacher cache says of itself, checked before it is believed: its manifest, and the tensors of each shard."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_compress.distillation.teachers.draws import MOST_DRAWS

SHARD = re.compile(r"shard-[0-9a-f]{16}\.safetensors")  # nothing that leads out of the folder
SIDES = ("example", "input", "decoder", "draw")


def is_shard(name: Any, entry: Any) -> bool:
    """Whether a manifest's entry can be one of a shard: a name of ours, its length, its hash, its examples."""
    if not (isinstance(name, str) and SHARD.fullmatch(name) and isinstance(entry, dict)):
        return False
    counts = [entry.get("size_bytes"), entry.get("examples")]
    return all(_is_count(count) for count in counts) and bool(re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))))


def check_manifest(file: Path | str, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the entry, for a manifest that no run of ours has written."""
    is_text, is_texts = lambda v: isinstance(v, str), lambda v: isinstance(v, list) and all(map(is_text, v))
    wanted = {
        "is_complete": lambda v: isinstance(v, bool),
        "shards": lambda v: isinstance(v, dict) and all(is_shard(name, entry) for name, entry in v.items()),
        "teacher": lambda v: isinstance(v, dict) and is_text(v.get("fingerprint")) and is_text(v.get("class"))
        and "config" in v
        and (v["config"] is None or (isinstance(v["config"], dict) and is_text(v["config"].get("model_type")))),
        "tokenizer": lambda v: v is None or is_text(v),
        "inputs": lambda v: is_texts(v) and bool(v),
        "top_k": lambda v: v is None or _is_count(v),
        "draws": lambda v: v is None or (_is_count(v) and 1 <= v <= MOST_DRAWS),
        "hidden_states": lambda v: isinstance(v, list) and all(map(_is_count, v)),
        "num_hidden_states": lambda v: v is None or _is_count(v),
        "dtype": is_text,
        "classes": _is_count,
        "stored": lambda v: isinstance(v, dict) and bool(v) and all(side in SIDES for side in v.values())
        and all(re.fullmatch(r"[a-z_]+|hidden_states\.[0-9]+", name) for name in v),
    }  # fmt: skip
    for name, fits in wanted.items():
        if name not in manifest or not fits(manifest[name]):
            raise ValueError(
                f"{file} is damaged: {name} is {str(manifest.get(name, 'missing'))[:80]}. Delete the folder and write "
                "the cache again with hfc.cache_teacher."
            )
    drawn = {name for name, side in manifest["stored"].items() if name in ("drawn_sizes", "entropy") or side == "draw"}
    if drawn != ({"drawn", "drawn_sizes", "entropy"} if manifest["draws"] else set()):
        raise ValueError(f"{file} is damaged: draws={manifest['draws']}, but it stores {sorted(manifest['stored'])}.")
    if manifest["is_complete"] and not manifest["shards"]:
        raise ValueError(f"{file} is damaged: it has no shards. Delete the folder and write the cache again.")


def check_shard(file: Path | str, shard: Mapping[str, Tensor], stored: Mapping[str, str]) -> None:
    """Raise ValueError for tensors that are not those of the manifest, with a row for each of the shard's keys."""
    needed = {"keys", *stored, *(f"{side}_lengths" for side in SIDES[1:] if side in stored.values())}
    if missing := sorted(needed - shard.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)}, which its manifest says it has: the cache is damaged.")
    examples = shard["keys"].numel()
    for name in needed:
        side = stored.get(name, "example")
        rows = examples if side == "example" else int(shard[f"{side}_lengths"].sum())
        if shard[name].dim() == 0 or len(shard[name]) != rows:
            raise ValueError(f"{file}: {name} has {list(shard[name].shape)}, expected {rows} rows: it is damaged.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
