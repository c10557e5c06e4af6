"""The record of what compression changed: `config.json["quantization_config"]`, in up to three parts.

    {"quant_method": "hf_compress", "version": 1, "digest": "...", "structure": {...}, "bits": {...}, "sparsity": {...}}

    digest     of the parts: a record that was changed by hand is refused, since tensors alone do not show every change

    structure  shapes and attributes that differ from what the config alone would build
    bits       module -> how its weight is packed
    sparsity   module -> how its blocks are stored

Modules are named without the base model's prefix ("encoder.layer.0", not "bert.encoder.layer.0"), so that every task
class of a family, and the bare backbone, finds them.
"""

import copy
import hashlib
import json
from collections.abc import Collection
from typing import Any

QUANT_METHOD = "hf_compress"
VERSION = 1
PARTS = ("structure", "bits", "sparsity")


def read_record(config) -> dict[str, Any]:
    """The record of a model's config as a plain dict of its own, empty if there is none.

    Raises ValueError if the config belongs to another quantization method.
    """
    record = getattr(config, "quantization_config", None)
    if record is None:
        return {}
    record = copy.deepcopy(record) if isinstance(record, dict) else record.to_dict()
    if record.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"This model was quantized by {record.get('quant_method')!r}, whose format cannot hold what hf_compress "
            "changes. Dequantize it first: `model.dequantize()`."
        )
    return record


def read_part(config, part: str) -> dict[str, Any]:
    """One part of the record, empty if there is none. The result is a copy; `write_part` stores it."""
    return read_record(config).get(part) or {}


def write_part(config, part: str, value: dict[str, Any]) -> None:
    """Changes `config`: stores one part of the record, or takes the part away if `value` is empty.

    The record is a new object each time, so a config that shares it with another is not changed through it.
    """
    record = {"quant_method": QUANT_METHOD, "version": VERSION, **read_record(config), part: copy.deepcopy(value)}
    record = {key: record[key] for key in record if key not in PARTS or record[key]}
    if any(part in record for part in PARTS):
        record["digest"] = record_digest(record)
        config.quantization_config = record
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def record_digest(record: dict[str, Any]) -> str:
    """What the parts of a record say, in 16 hexadecimal digits."""
    parts = {part: record[part] for part in PARTS if record.get(part)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def stored_name(model, name: str) -> str:
    """How the record calls the module `name` of `model`."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def find_name(model, stored: str, names: Collection[str] | None = None) -> str | None:
    """The name within `model` of the module that the record calls `stored`; None if `model` has no such module.

    `names` are those of all modules, for one who asks often.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names = dict(model.named_modules()) if names is None else names
    return next((name for name in (f"{prefix}.{stored}", stored) if name in names), None)
