"""A recipe: stages in a chain, each kept by the fingerprint of what went in, so that only what changed runs again."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from hf_compress.checkpoint.opening import check_source, model_folder
from hf_compress.recipe.data import DataOptions, RecipeData
from hf_compress.recipe.fingerprints import code_fingerprint, digest, model_fingerprint
from hf_compress.recipe.options import RecipeError, build, check_seed, read_yaml, unknown
from hf_compress.recipe.publish import evaluation_of, exports_of, leave
from hf_compress.recipe.stage import INPUT, Made, Past, Stage, Work
from hf_compress.recipe.stages import read_stages
from hf_compress.recipe.store import Store
from hf_compress.recipe.tasks.table import TASKS, task_of
from hf_compress.training.progress import our_bars_alone
from hf_compress.training.ranks import are_several, check_same, failing_together, is_main

logger = logging.getLogger(__name__)

KEYS = ("name", "description", "model", "task", "seed", "data", "stages")
MARKER = ".model.fingerprint"  # of the model that is in the output
REPORT_FILES = ("report.json", "report.md", "report.csv", "report.html", "report.png")


@dataclass(frozen=True)
class RecipeResult:
    """Where a recipe's results are. `stages` holds the record of each, in order; `report` is None where no evaluation
    is of `model`, the one that the run ends with; `exports` are folders that it was exported to, by format."""

    output: Path
    model: Path | str
    stages: tuple[dict[str, Any], ...]
    report: Path | None = None
    exports: Mapping[str, Path] = field(default_factory=dict)


class Recipe:
    """Stages that make a smaller model out of a model and texts.

    Args:
        stages: a list of single-entry mappings, kind -> options: `[{"fine-tune": {...}}, {"quantize": {"bits": 8}}]`.
            Kinds are fine-tune, distil, prune, quantize, evaluate, export, publish, and together, which takes a list.
        model: a folder or Hub name, where the recipe begins.
        data: a file, folder or Hub name, or a mapping with `source`, `text_column`, `label_column`, `max_length`.
        task: one of `recipe.tasks.table.TASKS`; told by the model's class or the data's columns when not given.
        seed: of every stage that draws.

    Raises RecipeError, a ValueError, naming the stage and the nearest name that is known, before anything runs.
    """

    def __init__(
        self,
        stages: Sequence[Mapping[str, Any]],
        *,
        model: str | Path | None = None,
        data: str | Mapping[str, Any] | None = None,
        task: str | None = None,
        seed: int = 0,
        name: str = "recipe",
        description: str = "",
    ):
        said = {"task": task, "seed": seed, "name": name, "description": description}
        said = build(_Said, {**said, "model": str(model) if isinstance(model, Path) else model}, "The recipe")
        if said.task is not None and said.task not in TASKS:
            raise unknown(said.task, TASKS, "The task")
        if data is not None and not isinstance(data, (str, Path, Mapping)):
            raise RecipeError(f"The recipe: data must be a file, a folder, a name or a mapping, got {data!r}.")
        self.stages = read_stages(stages)
        self.model = said.model if said.model is None else model_folder(said.model)
        self.task, self.name, self.description = said.task, said.name, said.description
        self.data = {"source": str(data)} if isinstance(data, (str, Path)) else dict(data or {})
        self.seed, self.written = said.seed, stages

    @classmethod
    def from_yaml(cls, source: str | Path) -> "Recipe":
        """A recipe from a file, or a ready one by its name, such as `classifier-cpu`."""
        text, where = _read(source)
        written = read_yaml(text, where)
        if not isinstance(written, Mapping):
            raise RecipeError(f"{where} must hold a mapping with the keys {', '.join(KEYS)}.")
        for key in written:
            if key not in KEYS:
                raise unknown(str(key), KEYS, f"{where}: the key")
        if "stages" not in written:
            raise RecipeError(f"{where} has no stages.")
        return cls(**{"name": Path(where).stem, **written})

    def changed(self, **changes: Any) -> "Recipe":
        """A recipe like this one, but for some arguments."""
        same = {name: getattr(self, name) for name in ("model", "data", "task", "seed", "name", "description")}
        return Recipe(**{"stages": self.written, **same, **changes})

    def to_yaml(self) -> str:
        """The recipe as it is now, with what was added to the file it came from."""
        whole = {"name": self.name, "task": self.task, "model": str(self.model), "seed": self.seed, "data": self.data,
                 "stages": self.written}  # fmt: skip
        return yaml.safe_dump({k: v for k, v in whole.items() if v not in (None, {}, "None")}, sort_keys=False)

    def run(self, output_dir: str | Path, *, command: str | None = None) -> RecipeResult:
        """Run the stages that have not run on the same things before. Results are in `output_dir`.

        An interrupted run goes on where it stopped: finished stages are kept, a training resumes from its last
        checkpoint. Raises RecipeError for what its writer can mend.
        """
        with failing_together():
            data, past = self._open()
        if are_several():
            texts = data.fingerprint if any(stage.reads for stage in self.stages) else ""
            facts = {"the model": past.last.fingerprint, "the data": texts, "the code": code_fingerprint(),
                     "the recipe": digest([[stage.settings() for stage in self.stages], self.seed])}  # fmt: skip
            check_same(facts, "A recipe")
        command = command or f"hf-compress run {self.name}"
        with Store(output_dir) as store, our_bars_alone():
            left = [name for stage in self.stages for name in stage.leaves]
            store.check(["recipe.yaml", "stages.json", MARKER, *REPORT_FILES, *left])  # hours before they come
            for number, stage in enumerate(self.stages, 1):
                key = self._fingerprint(stage, past, data)
                folder, place = store.place(number, stage.name, key), f"{number}/{len(self.stages)}"
                if record := store.record(folder):
                    logger.warning("%s %s: kept from an earlier run", place, stage.name)
                else:
                    if stage.sends:  # whatever the Hub says, all that was made is in its place
                        self._leave(store, past)
                    if stage.makes_model:
                        store.check(["model"])
                    logger.warning("%s %s", place, _announced(stage, data, store))
                    work = Work(store.partial(folder), store.folder, past, data, self.seed, command)
                    record = store.make(stage, folder, key, work)
                past.add(stage, folder, record)
            return self._leave(store, past)

    def _open(self) -> tuple[RecipeData, Past]:
        """The texts and the model that it begins with. Raises RecipeError for what is missing or does not fit."""
        if self.model is None:
            raise RecipeError("The recipe names no model: give a folder or a Hub name (`model:`, or --model).")
        reading = [stage for stage in self.stages if stage.reads]
        if self.data.get("source"):  # what is given is looked at, whether or not a stage needs it
            reading = reading or [stage for stage in self.stages if stage.makes_model]
        elif reading:
            raise RecipeError("The recipe names no data: give a file, a folder or a Hub name (`data:`, or --data).")
        past = Past([Made(INPUT, self.model, model_fingerprint(self.model))])
        makes = any(stage.makes_model for stage in self.stages)
        options = build(DataOptions, {"source": "", **self.data}, "data") if reading or makes else DataOptions("")
        parts = [part for stage in self.stages for part in stage.parts]
        needs_labels = any(part.needs_labels for part in parts)
        data = RecipeData(options, self.task or task_of(self.model, options), needs_labels=needs_labels)
        bits = (getattr(AutoConfig.from_pretrained(self.model), "quantization_config", None) or {}).get("bits")
        for number, stage in enumerate(self.stages):
            stage.check(self.model, data)
            if stage.needs_packed and not bits and not any(earlier.packs for earlier in self.stages[:number]):
                raise RecipeError(f"{stage.name}: {stage.own.format} is of packed models: quantize before it.")
        if makes and not reading and not data.kind.has_head(AutoConfig.from_pretrained(self.model)):
            raise RecipeError(f"{self.model} has no head for {data.kind.predicts}: say the --task that it is for.")
        if makes and not reading:
            data.tokenizer(self.model)  # which is saved beside what is made
        if reading:
            data.tell()
            known = {INPUT, *(stage.name for stage in self.stages)}
            for part in (part for part in parts if part.needs_labels):
                data.check_labelled(part.split)
            for part in (part for part in parts if part.method.trains and data.labels):
                if getattr(part.own, "eval_strategy", "no") != "no":  # or hours later
                    data.check_labelled("validation")
            named = [model_folder(name) for part in parts for name in part.named() if name not in known]
            for source in named:
                check_source(source)
            for source in (self.model, *named):
                data.tokenizer(source)
                data.check_length(source)
            if not reading[0].tunes:
                data.check_labels(AutoConfig.from_pretrained(self.model), f"The model that enters {reading[0].name}")
        return data, past

    def _fingerprint(self, stage: Stage, past: Past, data: RecipeData) -> str:
        """Of everything that the result of `stage` depends on."""
        texts = data.fingerprint if stage.reads else ""
        return digest(
            [code_fingerprint(), stage.settings(), past.last.fingerprint, texts, stage.needs(past), self.seed]
        )

    def _leave(self, store: Store, past: Past) -> RecipeResult:
        """Write what the output holds beside the stages: the last model, and a report of that model if there is one.

        What tells of another model goes before the model comes.
        """
        last, is_new, evaluation = past.last, len(past.models) > 1, evaluation_of(past)
        source, exports = last.source, {format: store.folder / format for format in exports_of(past)}
        report = None if evaluation is None else store.folder
        if is_main():
            marker = store.folder / MARKER
            is_there = marker.is_file() and marker.read_text(encoding="utf-8") == last.fingerprint
            if not is_there:
                store.remove([*REPORT_FILES, "stages.json", MARKER, *([] if is_new else ["model"])])
            if is_new and not (is_there and (store.folder / "model").is_dir()):
                store.copy(Path(last.source), "model")
            source = store.folder / "model" if is_new else source
            left: dict[str, str | bytes] = {"recipe.yaml": self.to_yaml()}
            left["stages.json"] = json.dumps(past.records, indent=2)
            if evaluation is not None:
                folder = store.folder / "stages" / evaluation["folder"]
                left |= {name: (folder / name).read_bytes() for name in REPORT_FILES if (folder / name).is_file()}
            elif any(record["kind"] == "evaluate" for record in past.records):
                logger.warning("No evaluation is of the model that the run ends with: evaluate after the last change.")
            leave(store, past)
            store.write({**left, MARKER: last.fingerprint})
        return RecipeResult(store.folder, source, tuple(past.records), report, exports)


def _announced(stage: Stage, data: RecipeData, store: Store) -> str:
    """What a stage does, on how much, and how long it took last time."""
    does = " and ".join(part.kind if part.kind == part.method.name else f"{part.kind} by {part.method.name}"
                        for part in stage.parts)  # fmt: skip
    line = does if does == stage.name else f"{stage.name}: {does}"
    if stage.split:
        line += f", {data.count(stage.split, labelled=not stage.unlabelled):,} {stage.split} texts"
    seconds = store.seconds_before(stage.name)
    return line if seconds is None else f"{line}, {seconds:.0f} s last time"


@dataclass
class _Said:
    """What a recipe says beside its data and its stages."""

    task: str | None = None
    seed: int = 0
    name: str = "recipe"
    description: str = ""
    model: str | None = None

    def __post_init__(self):
        check_seed("seed", self.seed)


def ready_recipes() -> dict[str, str]:
    """name -> description of the recipes that come with the package."""
    folder = files("hf_compress.recipe") / "ready"
    found = sorted(file for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {
        f.name.removesuffix(".yaml"): read_yaml(f.read_text(encoding="utf-8"), f.name)["description"] for f in found
    }


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8"), path.name
    ready = files("hf_compress.recipe") / "ready" / f"{source}.yaml"
    if ready.is_file():
        return ready.read_text(encoding="utf-8"), f"{source}.yaml"
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"There is no recipe {source}: the file does not exist.")
    raise unknown(str(source), ready_recipes(), "There is no file of that name, and the ready recipe")
