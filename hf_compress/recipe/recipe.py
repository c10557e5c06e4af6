"""A recipe: stages in a chain, each kept by the fingerprint of what went in, so that only what changed runs again."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hf_compress.files.whole import write_whole
from hf_compress.publishing.hub import publish
from hf_compress.recipe.checks import check_data, check_exports, need_labels
from hf_compress.recipe.data import DataOptions, RecipeData
from hf_compress.recipe.evaluate import chosen_models, evaluate, main_figures
from hf_compress.recipe.fingerprints import code_fingerprint, digest, model_fingerprint, settings
from hf_compress.recipe.options import RecipeError, build, read_yaml, unknown
from hf_compress.recipe.publish import NO_MODEL, card_stages, evaluation_of, exports_left, leave, runnable_exports
from hf_compress.recipe.stages import Stage, StudentOptions, read_stages
from hf_compress.recipe.store import Store
from hf_compress.recipe.tasks.table import TASKS, task_of
from hf_compress.recipe.training import Work, change_model, export_model
from hf_compress.report.headline import headline
from hf_compress.training.progress import our_bars_alone
from hf_compress.training.ranks import is_main, wait_for_all
from hf_compress.version import __version__

logger = logging.getLogger(__name__)

KEYS = ("name", "description", "model", "task", "seed", "data", "stages")
INPUT = "input"  # what stages call the model that a recipe begins with
MARKER = ".model.fingerprint"  # of the model that is in the output
REPORT_FILES = ("report.json", "report.md", "report.csv", "report.html", "report.png")


@dataclass(frozen=True)
class Made:
    """What has been made so far: the model, where it is, and the fingerprint of all that led to it."""

    name: str
    source: str | Path
    fingerprint: str


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
        if task is not None and task not in TASKS:
            raise unknown(task, TASKS, "The task")
        self.stages = read_stages(stages)
        self.model, self.task, self.name, self.description = model, task, name, description
        self.data = {"source": data} if isinstance(data, (str, Path)) else dict(data or {})
        self.seed, self.written = build(_Seed, {"seed": seed}, "The recipe").seed, stages

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
        if self.model is None:
            raise RecipeError("The recipe names no model: give a folder or a Hub name (`model:`, or --model).")
        needs_data = any(stage.kind != "publish" for stage in self.stages)
        if needs_data and not self.data.get("source"):
            raise RecipeError("The recipe names no data: give a file, a folder or a Hub name (`data:`, or --data).")
        made = [Made(INPUT, self.model, model_fingerprint(self.model))]
        options = build(DataOptions, self.data, "data") if needs_data else DataOptions(source="")
        data = RecipeData(options, self.task or task_of(self.model, options), needs_labels=need_labels(self.stages))
        if needs_data:
            check_data(data, self.model, self.stages, INPUT)
        check_exports(self.stages, self.model, data.task)
        with Store(output_dir) as store, our_bars_alone():
            return self._run_stages(store, made, data, command)

    def _run_stages(self, store: Store, made: list[Made], data: RecipeData, command: str | None) -> RecipeResult:
        if is_main():
            exports = [stage.own.format for stage in self.stages if stage.kind == "export"]
            store.check(["recipe.yaml", "stages.json", MARKER, *REPORT_FILES, *exports])  # hours before they come
        records: list[dict[str, Any]] = []
        for number, stage in enumerate(self.stages, 1):
            fingerprint = self._fingerprint(stage, made, data, records)
            folder = store.place(number, stage.name, fingerprint)
            record = store.record(folder)
            if record is None:
                if stage.kind == "publish" and is_main():  # whatever the Hub says, all that was made is in its place
                    self._leave(store, made, records)
                if stage.kind not in NO_MODEL and is_main():
                    store.check(["model"])
                logger.warning("%d/%d %s", number, len(self.stages), self._announce(stage, data, store))
                record = self._run_stage(stage, store, folder, fingerprint, made, data, records, command)
            else:
                logger.warning("%d/%d %s: kept from an earlier run", number, len(self.stages), stage.name)
            records.append(record)
            if (folder / "model").is_dir():
                made.append(Made(stage.name, folder / "model", fingerprint))
        source, last = self._leave(store, made, records) if is_main() else made[-1].source, made[-1].fingerprint
        report = None if evaluation_of(last, records) is None else store.folder
        return RecipeResult(store.folder, source, tuple(records), report, exports_left(store.folder, last, records))

    @staticmethod
    def _announce(stage: Stage, data: RecipeData, store: Store) -> str:
        """What a stage does, on how much, and how long it took last time."""
        does = " and ".join(part.kind if part.kind == part.method.name else f"{part.kind} by {part.method.name}"
                            for part in stage.parts or (stage,))  # fmt: skip
        line = does if does == stage.name else f"{stage.name}: {does}"
        if stage.parts or stage.method.trains or stage.kind == "evaluate":
            split = stage.own.split if stage.kind == "evaluate" else "train"
            line += f", {data.count(split, labelled=stage.part('distil') is None):,} {split} texts"
        seconds = store.seconds_before(stage.name)
        return line if seconds is None else f"{line}, {seconds:.0f} s last time"

    def _leave(self, store: Store, made: Sequence[Made], records: Sequence[Mapping[str, Any]]) -> Path | str:
        """Write what the output holds beside the stages: the last model, and a report of that model if there is one.

        Returns where the model is. What tells of another model goes before the model comes.
        """
        last, marker = made[-1], store.folder / MARKER
        is_there = marker.is_file() and marker.read_text(encoding="utf-8") == last.fingerprint
        if not is_there:
            store.remove([*REPORT_FILES, "stages.json", MARKER, *(["model"] if len(made) == 1 else [])])
        if len(made) > 1 and not (is_there and (store.folder / "model").is_dir()):
            store.copy(Path(last.source), "model")
        files: dict[str, str | bytes] = {"recipe.yaml": self.to_yaml(), "stages.json": json.dumps(records, indent=2)}
        if (evaluation := evaluation_of(last.fingerprint, records)) is not None:
            folder = store.folder / "stages" / evaluation["folder"]
            files |= {name: (folder / name).read_bytes() for name in REPORT_FILES if (folder / name).is_file()}
        elif any(record["kind"] == "evaluate" for record in records):
            logger.warning("No evaluation is of the model that the run ends with: evaluate after the last change.")
        leave(store, last.fingerprint, records)
        store.write({**files, MARKER: last.fingerprint})
        return store.folder / "model" if len(made) > 1 else last.source

    def _run_stage(
        self, stage: Stage, store: Store, folder: Path, fingerprint: str, made: Sequence[Made], data: RecipeData,
        before: Sequence[Mapping[str, Any]], command: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        start = time.time()
        partial = store.begin(folder) if is_main() else folder.with_name(folder.name + ".partial")
        wait_for_all()
        record = {"name": stage.name, "kind": stage.kind, "options": dict(stage.given), "folder": folder.name,
                  "fingerprint": fingerprint, "version": __version__}  # fmt: skip
        if stage.kind == "evaluate":
            figures = {}
            if is_main():
                sources = {one.name: one.source for one in made}
                models = chosen_models(stage.own, sources, made[-1].name, self._reference(made))
                exports = runnable_exports(made[-1].fingerprint, before)
                models |= {name: store.folder / place for name, place in exports.items()}
                report = evaluate(stage.own, models, data, command or f"hf-compress run {self.name}")
                for name, content in report.files().items():
                    write_whole(partial / name, content)
                figures = main_figures(report)
                record |= {"model": made[-1].fingerprint, "told": headline(report)}
        elif stage.kind == "publish":
            figures = self._publish(stage, made, before, partial) if is_main() else {}
        else:
            others = {"teacher": self._teacher(stage, made), "student": self._student(stage, made)}
            work = Work(partial, made[-1].source, data=data, seed=self.seed, saves=is_main(), **others)
            if stage.kind == "export":
                figures, record["model"] = export_model(stage, work) if is_main() else {}, made[-1].fingerprint
            elif stage.parts or stage.method.trains or is_main():
                figures = change_model(stage, work)
        wait_for_all()
        if is_main():
            store.finish(folder, {**record, "seconds": round(time.time() - start, 1), "figures": figures})
        wait_for_all()
        return store.record(folder)

    def _publish(
        self, stage: Stage, made: Sequence[Made], before: Sequence[Mapping[str, Any]], folder: Path
    ) -> dict[str, Any]:
        report = evaluation_of(made[-1].fingerprint, before)
        options = stage.own
        found = publish(
            made[-1].source,
            options.repo_id,
            private=not options.public,
            dry_run=options.dry_run,
            stages=card_stages(before),
            report=None if report is None else folder.parent / report["folder"],
            **options.card_options(),
        )
        return {"repo_id": found.repo_id, "files": found.files, "url": found.url}

    def _fingerprint(
        self, stage: Stage, made: Sequence[Made], data: RecipeData, before: Sequence[Mapping[str, Any]]
    ) -> str:
        """Of everything that the result of `stage` depends on."""
        parts = stage.parts or (stage,)
        options = [[part.kind, part.method.name, *map(settings, part.options)] for part in parts]
        others: dict[str, Any] = {}
        if stage.kind == "evaluate":
            sources = {one.name: one.source for one in made}
            chosen = chosen_models(stage.own, sources, made[-1].name, self._reference(made))
            others = {one.name: one.fingerprint for one in made if one.name in chosen}
            others |= runnable_exports(made[-1].fingerprint, before)  # their folders are named by fingerprints
        if stage.kind == "publish" and (report := evaluation_of(made[-1].fingerprint, before)):
            others["report"] = report["fingerprint"]
        known = {one.source: one.fingerprint for one in made}
        for role, source in (("teacher", self._teacher(stage, made)), ("student", self._student(stage, made))):
            if source is not None:
                others[role] = known.get(source) or model_fingerprint(source)
        texts = "" if stage.kind == "publish" else data.fingerprint
        return digest([code_fingerprint(), options, made[-1].fingerprint, texts, others, self.seed])

    def _teacher(self, stage: Stage, made: Sequence[Made]) -> str | Path | None:
        part = stage.part("distil")
        if part is None:
            return None
        options = next(option for option in part.options if isinstance(option, StudentOptions))
        if options.teacher is not None:
            return _source(options.teacher, made)
        if options.shape() or options.student:
            return made[-1].source
        return next(one.source for one in made if one.name == self._reference(made))

    @staticmethod
    def _student(stage: Stage, made: Sequence[Made]) -> str | Path | None:
        part = stage.part("distil")
        options = [] if part is None else [o for o in part.options if isinstance(o, StudentOptions)]
        return _source(options[0].student, made) if options and options[0].student else None

    def _reference(self, made: Sequence[Made]) -> str:
        """What the model is held against, and learns from: the last fine-tuned one, else the one that came in."""
        tuned = {stage.name for stage in self.stages if stage.part("fine-tune")}
        return next((one.name for one in reversed(made) if one.name in tuned), INPUT)


def _source(name: str, made: Sequence[Made]) -> str | Path:
    """The model of the stage of that name, else the folder or Hub name that it is."""
    return next((one.source for one in made if one.name == name), name)


@dataclass
class _Seed:
    seed: int = 0


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
