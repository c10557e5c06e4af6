"""What leaves a recipe: exported folders for other readers, and the model, its card and its report for the Hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_compress.files.whole import discard
from hf_compress.formats.export import FORMATS, RUNTIMES, export, installed
from hf_compress.formats.runtimes.agreement import TEXTS
from hf_compress.formats.runtimes.folder import RECORD
from hf_compress.publishing.hub import check_repo_id, publish
from hf_compress.recipe.data import RecipeData
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.stage import NO_MODEL, Past, Stage, Work
from hf_compress.recipe.store import Store
from hf_compress.recipe.tasks.language import CausalLM
from hf_compress.report.card import Stage as CardStage
from hf_compress.report.privacy import public_word

EXPORT = "export"  # the folder of a stage that writes one
RUN_HERE = ("openvino", "onnx", "plain")  # formats that a comparison runs
PACKED = ("compressed-tensors", "gemma", "gptq")  # formats of weights in few bits alone
GRAPHS = ("openvino", "onnx")  # formats that are run on texts beside the model


@dataclass
class ExportOptions:
    """Write the model for readers that do not know hf_compress, into a folder named as the format."""

    format: str = field(metadata={"help": f"One of {', '.join(FORMATS)}."})

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}.")


class Export(Stage):
    @property
    def needs_packed(self) -> bool:
        return self.own.format in PACKED

    @property
    def leaves(self) -> list[str]:
        return [self.own.format]

    def check(self, model: str | Path, data: RecipeData) -> None:
        """A runtime that is not installed is refused, and a model that GGUF has no name for."""
        format, family = self.own.format, AutoConfig.from_pretrained(model).model_type
        if format in RUNTIMES:
            try:
                installed(format)
            except ImportError as error:
                raise RecipeError(f"{self.name}: {error}") from error
        families = import_module("hf_compress.formats.runtimes.gguf_llama").FAMILIES if format == "gguf" else (family,)
        if family not in families or (format == "gguf" and data.task != CausalLM.name):
            raise RecipeError(f"{self.name}: gguf holds language models of {families}, not a {family} for {data.task}.")

    def run(self, work: Work) -> dict[str, Any]:
        """The figures say how far what was written agreed with the model."""
        folder, tokenizer = work.folder / EXPORT, work.data.tokenizer(work.source)
        discard(folder)  # whole, but of a run that was cut off behind it
        model, options = work.load(work.source), {}
        if self.own.format in GRAPHS:
            options["calibration"] = work.samples(model, tokenizer).loader(TEXTS, TEXTS // 2)
        export(model, folder, format=self.own.format, tokenizer=tokenizer, **options)
        record = folder / RECORD
        figures = json.loads(record.read_text(encoding="utf-8"))["agreement"] if record.is_file() else {}
        return {"model": work.past.last.fingerprint, "figures": figures}


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

    def __post_init__(self):
        check_repo_id(self.repo_id)

    def card_options(self) -> dict[str, Any]:
        names = ("base_model", "dataset_id", "license", "language")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, **({"allow": tuple(self.allow.split(","))} if self.allow else {})}


class Publish(Stage):
    reads, sends = False, True

    def needs(self, past: Past) -> dict[str, str]:
        report = evaluation_of(past)
        return {"report": report["fingerprint"]} if report else {}

    def run(self, work: Work) -> dict[str, Any]:
        report, options = evaluation_of(work.past), self.own
        found = publish(
            work.source,
            options.repo_id,
            private=not options.public,
            dry_run=options.dry_run,
            stages=card_stages(work.past.records),
            report=None if report is None else work.folder.parent / report["folder"],
            **options.card_options(),
        )
        return {"figures": {"repo_id": found.repo_id, "files": found.files, "url": found.url}}


def card_stages(records: Sequence[Mapping[str, Any]]) -> list[CardStage]:
    """What a card tells of the stages that made a model: their kind, method and options."""
    told = []
    for record in records:
        if record["kind"] in NO_MODEL:
            continue
        parts = record["options"].get("stages") or [{"kind": record["kind"], **record["options"]}]
        for part in parts:
            options = {name: public_word(value) if isinstance(value, str) else value
                       for name, value in part.items() if name not in ("kind", "method", "name")}  # fmt: skip
            told.append(CardStage(f"{part['kind']}, {part['method']}", options))
    return told


def evaluation_of(past: Past) -> Mapping[str, Any] | None:
    """The last evaluation of the model that there is now; None where all are of what it was before."""
    found = (record for record in reversed(past.records) if record["kind"] == "evaluate")
    return next((record for record in found if record.get("model") == past.last.fingerprint), None)


def exports_of(past: Past) -> dict[str, Mapping[str, Any]]:
    """Format -> the record of the last export of the model that there is now."""
    exports = (record for record in past.records if record["kind"] == "export")
    return {r["options"]["format"]: r for r in exports if r["model"] == past.last.fingerprint}


def place_of(record: Mapping[str, Any]) -> Path:
    """Where a stage wrote its export, within the output."""
    return Path("stages", record["folder"], EXPORT)


def runnable_exports(past: Past) -> dict[str, Path]:
    """Stage -> its export within the output, of those that a comparison runs."""
    return {r["name"]: place_of(r) for format, r in exports_of(past).items() if format in RUN_HERE}


def leave(store: Store, past: Past) -> None:
    """Copy the exports of the last model into the output; those of another go first."""
    found = exports_of(past)
    for format in FORMATS:
        marker, record = store.folder / f".{format}.fingerprint", found.get(format)
        there = marker.read_text(encoding="utf-8") if marker.is_file() else None
        if there is not None and (record is None or there != record["fingerprint"]):
            store.remove([marker.name, format])
        if record is not None and not (marker.is_file() and (store.folder / format).is_dir()):
            store.copy(store.folder / place_of(record), format)
            store.write({marker.name: record["fingerprint"]})
