"""What leaves a recipe: exported folders for other readers, and the model, its card and its report for the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_compress.formats.export import FORMATS
from hf_compress.recipe.store import Store
from hf_compress.report.card import Stage
from hf_compress.report.privacy import public_word

EXPORT = "export"  # the folder of a stage that writes one
RUN_HERE = ("openvino", "onnx", "plain")  # formats that a comparison runs
NO_MODEL = ("evaluate", "export", "publish")  # stages that change none


@dataclass
class ExportOptions:
    """Write the model for readers that do not know hf_compress, into a folder named as the format."""

    format: str = field(metadata={"help": f"One of {', '.join(FORMATS)}."})

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}.")


@dataclass
class PublishOptions:
    """Where the model goes; private unless asked otherwise."""

    repo_id: str = field(metadata={"help": "Name on the Hub, such as me/small-bert."})
    public: bool = field(default=False, metadata={"help": "Make the repository public; private by default."})
    base_model: str | None = field(default=None, metadata={"help": "Hub name of what the model was made from."})
    dataset_id: str | None = field(default=None, metadata={"help": "Hub name or identifier of the data."})
    license: str | None = field(default=None, metadata={"help": "Licence of the model, such as apache-2.0."})
    language: str | None = field(default=None, metadata={"help": "Language of the texts, such as en."})
    allow: str | None = field(
        default=None,
        metadata={"help": "Texts, with commas, that may be published though they look private."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Make everything that would be sent, and send nothing."})

    def card_options(self) -> dict[str, Any]:
        names = ("base_model", "dataset_id", "license", "language")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, **({"allow": tuple(self.allow.split(","))} if self.allow else {})}


def card_stages(records: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """What a card tells of the stages that made a model: their kind, method and options."""
    told = []
    for record in records:
        if record["kind"] in NO_MODEL:
            continue
        parts = record["options"].get("stages") or [{"kind": record["kind"], **record["options"]}]
        for part in parts:
            options = {name: public_word(value) if isinstance(value, str) else value
                       for name, value in part.items() if name not in ("kind", "method", "name")}  # fmt: skip
            told.append(Stage(f"{part['kind']}, {part['method']}", options))
    return told


def evaluation_of(model: str, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last evaluation of the model with this fingerprint; None where all are of what it was before."""
    found = (record for record in reversed(records) if record["kind"] == "evaluate")
    return next((record for record in found if record.get("model") == model), None)


def exports_of(model: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Format -> the record of its last export of the model with this fingerprint."""
    return {r["options"]["format"]: r for r in records if r["kind"] == "export" and r["model"] == model}


def place_of(record: Mapping[str, Any]) -> Path:
    """Where a stage wrote its export, within the output."""
    return Path("stages", record["folder"], EXPORT)


def runnable_exports(model: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """Stage -> its export within the output, of those that a comparison runs."""
    return {r["name"]: place_of(r) for format, r in exports_of(model, records).items() if format in RUN_HERE}


def exports_left(output: Path, model: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """Format -> the folder in the output that holds the last model's export."""
    return {format: output / format for format in exports_of(model, records)}


def leave(store: Store, model: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Copy the exports of the last model into the output; those of another go first."""
    found = exports_of(model, records)
    for format in FORMATS:
        marker, record = store.folder / f".{format}.fingerprint", found.get(format)
        there = marker.read_text(encoding="utf-8") if marker.is_file() else None
        if there is not None and (record is None or there != record["fingerprint"]):
            store.remove([marker.name, format])
        if record is not None and not (marker.is_file() and (store.folder / format).is_dir()):
            store.copy(store.folder / place_of(record), format)
            store.write({marker.name: record["fingerprint"]})
