"""The last stage of a recipe: the model, its card and its report go to the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_compress.report.card import Stage
from hf_compress.report.privacy import public_word


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
        if record["kind"] in ("evaluate", "publish"):
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
