"""A stage of a recipe: what every kind says of itself, what came before it, and what it is given to work on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.checkpoint.opening import model_folder, open_model
from hf_compress.recipe.data import RecipeData
from hf_compress.recipe.fingerprints import model_fingerprint, settings
from hf_compress.recipe.one_shot import Samples

INPUT = "input"  # what stages call the model that a recipe begins with
NO_MODEL = ("evaluate", "export", "publish")  # kinds that change none


@dataclass(frozen=True)
class Made:
    """A model: what stages call it, where it is, and the fingerprint of all that led to it."""

    name: str
    source: str | Path
    fingerprint: str
    is_tuned: bool = False


@dataclass
class Past:
    """What came before a stage: models, the one that the recipe began with first, and the records of all stages."""

    models: list[Made]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last(self) -> Made:
        return self.models[-1]

    @property
    def reference(self) -> Made:
        """What a model is held against, and learns from: the last fine-tuned one, else the one that came in."""
        return next((one for one in reversed(self.models) if one.is_tuned), self.models[0])

    def find(self, name: str) -> Made:
        """The model of the stage of that name, else the folder or Hub name that it is."""
        found = next((one for one in self.models if one.name == name), None)
        if found is None:
            name = model_folder(name)
            found = Made(str(name), name, model_fingerprint(name))
        return found

    def add(self, stage: "Stage", folder: Path, record: dict[str, Any]) -> None:
        self.records.append(record)
        if (folder / "model").is_dir():
            self.models.append(Made(stage.name, folder / "model", record["fingerprint"], stage.tunes))


@dataclass(frozen=True)
class Work:
    """What a stage is given."""

    folder: Path  # its working folder
    output: Path  # the recipe's
    past: Past
    data: RecipeData
    seed: int
    command: str  # for reports

    @property
    def source(self) -> str | Path:
        """The model that enters."""
        return self.past.last.source

    def samples(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Samples:
        rows = self.data.tokenized(tokenizer, model.config)["train"]
        return Samples(self.data.training_texts(), rows, self.data.collator(tokenizer), self.seed)

    def load(
        self, source: str | Path, *, fresh_head: bool = False, teacher: PretrainedConfig | None = None
    ) -> PreTrainedModel:
        return load_for(self.data, source, fresh_head=fresh_head, teacher=teacher)


def load_for(
    data: RecipeData, source: str | Path, *, fresh_head: bool = False, teacher: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model for the task of `data`. With `fresh_head`, labels that it does not know get a new head.

    A model without a head gets one for the labels of `teacher`, where one is given.
    """
    config, options = AutoConfig.from_pretrained(source), {}
    if fresh_head and not data.fits(config):
        options = data.kind.head(data.opened)
    elif teacher is not None and not data.kind.has_head(config):
        options = data.kind.of_teacher(teacher)
    if options:
        options["ignore_mismatched_sizes"] = options["num_labels"] != config.num_labels
    model_class = getattr(transformers, data.kind.auto_class)
    model = open_model(model_class, source, new_head=bool(options) or fresh_head, **options)
    if data.kind.pads and model.config.pad_token_id is None:  # a decoder finds a text's end by it
        model.config.pad_token_id = data.tokenizer(source).pad_token_id
    return model


@dataclass(frozen=True)
class Method:
    """One way to do a kind of stage: `options` are dataclasses, the last the method's own; `stage` does it."""

    kind: str
    name: str
    options: tuple[type, ...]
    stage: type["Stage"]
    trainer: type | None = None  # None for what does not train

    @property
    def trains(self) -> bool:
        return self.trainer is not None


@dataclass(frozen=True)
class Stage:
    """A stage whose options have been read. Its result depends on `settings`, on `needs`, on the model that enters and
    on the texts, if it `reads` them."""

    kind: str
    name: str
    method: Method
    options: tuple[Any, ...]  # one of each class of `method.options`
    given: Mapping[str, Any] = field(default_factory=dict)  # as they were written, for cards
    together: tuple["Stage", ...] = ()  # this one, and others that join its training

    reads = True  # the texts
    split: ClassVar[str | None] = None  # the one whose texts it goes through one by one,
    needs_labels, unlabelled = False, False  # with labels only; those without as well
    tunes = False  # learns the task, whatever the model's head: later models are held against it
    everywhere = False  # runs in each of several processes
    sends = False  # what the recipe has made leaves this machine

    @property
    def own(self) -> Any:
        """The options of the method itself."""
        return self.options[-1]

    @property
    def parts(self) -> tuple["Stage", ...]:
        return self.together or (self,)

    @property
    def makes_model(self) -> bool:
        return self.kind not in NO_MODEL

    @property
    def leaves(self) -> list[str]:
        """Folders in the recipe's output, beside the model's."""
        return []

    @property
    def packs(self) -> bool:
        return any(part.kind == "quantize" for part in self.parts)

    def settings(self) -> list[Any]:
        return [[part.kind, part.method.name, *map(settings, part.options)] for part in self.parts]

    @property
    def needs_packed(self) -> bool:
        """Whether it can be done with a model in few bits alone."""
        return False

    def named(self) -> list[str]:
        """Models that it takes by their names, or where they are."""
        return []

    def of_stages(self) -> list[str]:
        """Models that it takes by the names of stages alone."""
        return []

    def needs(self, past: Past) -> dict[str, str]:
        """The fingerprints of what it takes from elsewhere."""
        return {}

    def check(self, model: str | Path, data: RecipeData) -> None:
        """Raise RecipeError, before the recipe runs, for what cannot be done with a model like this."""

    def run(self, work: Work) -> dict[str, Any]:
        """Do it. Returns what its record tells: `figures`, and of which `model` where it changes none."""
        raise NotImplementedError
