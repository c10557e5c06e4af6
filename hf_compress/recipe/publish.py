"""The last stage of a recipe: the model, its card and its report go to the Hub."""

from dataclasses import dataclass, field
from typing import Any


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
