"""Subjects of the board: a model of real size, made by a recipe once, and texts that are held out properly."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks.overlap import overlaps
from demo import packaged

from hf_compress.files.whole import whole_folder, write_whole
from hf_compress.recipe import Recipe
from hf_compress.recipe.data import CLASSIFICATION, DataOptions, RecipeData
from hf_compress.recipe.fingerprints import digest, model_fingerprint
from hf_compress.recipe.options import RecipeError

FOLDER = Path(__file__).parent / "subjects"
PACKAGE = "package:"  # before a folder inside an installed package
VALIDATION = 100  # validation texts that are kept: nothing is chosen by them, a training only reports on them


@dataclass(frozen=True)
class Subject:
    """A recipe whose result is what all methods begin with, and a folder to keep it in.

    Its `model` is a folder, a Hub name or `package:NAME/FOLDER`; the `source` of its data lies in `data`.
    """

    recipe: Recipe
    data: Path
    folder: Path

    @classmethod
    def read(cls, file: Path, data: Path, output: Path) -> "Subject":
        recipe = Recipe.from_yaml(file)
        if recipe.model is None or "source" not in recipe.data or recipe.task != CLASSIFICATION:
            raise RecipeError(f"{file}: a subject names its model, its data's source, and the task {CLASSIFICATION}.")
        return cls(recipe, data, output / "subjects" / recipe.name)

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def model(self) -> Path:
        return self.folder / "run" / "model"

    @property
    def texts(self) -> dict[str, Any]:
        """The data of a recipe: the prepared texts."""
        return {**self.recipe.data, "source": str(self.folder / "data"), "dataset_name": self.name}

    @property
    def facts(self) -> dict[str, Any]:
        """How it was made: see `prepare`. Raises FileNotFoundError before that."""
        return json.loads((self.folder / "subject.json").read_text(encoding="utf-8"))

    @property
    def is_made(self) -> bool:
        return (self.folder / "subject.json").is_file() and self.facts["recipe"] == self._digest()

    def prepare(self) -> dict[str, Any]:
        """Write the texts and make the model, where that has not been done; an interrupted training goes on.

        Returns its facts: `fingerprint` of the model, `seconds` of its training, and of `overlap`, how many held-out
        texts stood in the train split and how many texts of that were taken out for it.
        """
        if self.is_made:
            return self.facts
        if not (self.folder / "data").is_dir():
            self._write_texts()
        result = self.recipe.changed(model=self._source(), data=self.texts).run(self.folder / "run")
        seconds = sum(stage["seconds"] for stage in result.stages)
        overlap = json.loads((self.folder / "data" / "overlap.json").read_text(encoding="utf-8"))
        facts = {"recipe": self._digest(), "fingerprint": model_fingerprint(self.model), "seconds": seconds,
                 "overlap": overlap}  # fmt: skip
        write_whole(self.folder / "subject.json", json.dumps(facts, indent=2))
        return facts

    def _digest(self) -> str:
        return digest([self.recipe.written, self.recipe.data, str(self.recipe.model)])

    def _source(self) -> str:
        model = str(self.recipe.model)
        if not model.startswith(PACKAGE):
            return str(self.data / model) if (self.data / model).is_dir() else model
        package, _, place = model.removeprefix(PACKAGE).partition("/")
        return str(packaged(package) / place)

    def _write_texts(self) -> None:
        """Train, validation and test files. What overlaps with held-out texts is taken out of the train split."""
        source = self.data / self.recipe.data["source"]
        options = {**self.recipe.data, "source": str(source) if source.exists() else self.recipe.data["source"]}
        data = RecipeData(DataOptions(**options), self.recipe.task, needs_labels=True)
        splits = dict(data.texts)
        splits["validation"] = splits["validation"].select(range(min(VALIDATION, len(splits["validation"]))))
        texts = {name: [" ".join(data.kind.texts(row)) for row in split] for name, split in splits.items()}
        found = {name: overlaps(texts["train"], texts[name]) for name in ("validation", "test")}
        gone = set()
        for matches in found.values():
            gone |= {match.train for match in matches}
        while more := _still_overlapping(texts, gone):  # a held-out text may be like several
            gone |= more
        splits["train"] = splits["train"].select([i for i in range(len(texts["train"])) if i not in gone])
        if not len(splits["train"]):
            raise RecipeError(f"{self.name}: all train texts overlap with held-out ones: nothing is left.")
        with whole_folder(self.folder / "data") as folder:
            for name, split in splits.items():
                rows = [{**row, "label": data.labels[row["label"]]} for row in split]
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            facts = {"train": len(texts["train"]), "taken_out": len(gone), **_counted(found, texts)}
            (folder / "overlap.json").write_text(json.dumps(facts), encoding="utf-8")


def _still_overlapping(texts: Mapping[str, list[str]], gone: set[int]) -> set[int]:
    kept = [i for i in range(len(texts["train"])) if i not in gone]
    train = [texts["train"][i] for i in kept]
    return {kept[match.train] for name in ("validation", "test") for match in overlaps(train, texts[name])}


def _counted(found: Mapping[str, list], texts: Mapping[str, list[str]]) -> dict[str, dict[str, int]]:
    return {
        name: {"texts": len(texts[name]), "same": sum(match.is_same for match in matches),
               "nearly": sum(not match.is_same for match in matches)}
        for name, matches in found.items()
    }  # fmt: skip


def find_subjects(data: Path, output: Path, folder: Path = FOLDER) -> dict[str, Subject]:
    """name -> subject, by the files of `folder`."""
    return {file.stem: Subject.read(file, data, output) for file in sorted(folder.glob("*.yaml"))}
