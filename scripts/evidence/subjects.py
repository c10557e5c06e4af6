"""Subjects of the board: a model of real size, made by a recipe once, and texts that are held out properly."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.texts import FACTS, write_texts
from film_sentences import packaged

from hf_compress.files.whole import discard, file_digest, write_whole
from hf_compress.recipe import Recipe
from hf_compress.recipe.data import CLASSIFICATION, DataOptions, RecipeData
from hf_compress.recipe.fingerprints import digest, model_fingerprint
from hf_compress.recipe.options import RecipeError

FOLDER = Path(__file__).parent / "subjects"
PACKAGE = "package:"  # before a folder inside an installed package


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

        Returns its facts: a `fingerprint` of model and texts, the digest of the `test_texts`, `seconds` of its
        training, and of `overlap` what `write_texts` found.
        """
        if self.is_made:
            return self.facts
        of, texts = self.folder / "data.digest", self.folder / "data"
        if not (of.is_file() and of.read_text(encoding="utf-8") == digest(self.recipe.data) and texts.is_dir()):
            discard(texts)
            write_texts(self._data(), texts)
            write_whole(of, digest(self.recipe.data))
        result = self.recipe.changed(model=self._source(), data=self.texts).run(self.folder / "run")
        files = {file.name: file_digest(file) for file in sorted(texts.iterdir())}
        facts = {
            "recipe": self._digest(), "fingerprint": digest([model_fingerprint(self.model), files]),
            "test_texts": files["test.jsonl"],
            "seconds": sum(stage["seconds"] for stage in result.stages),
            "overlap": json.loads((texts / FACTS).read_text(encoding="utf-8")),
        }  # fmt: skip
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

    def _data(self) -> RecipeData:
        source = self.data / self.recipe.data["source"]
        options = {**self.recipe.data, "source": str(source) if source.exists() else self.recipe.data["source"]}
        return RecipeData(DataOptions(**options), self.recipe.task, needs_labels=True)


def find_subjects(data: Path, output: Path, folder: Path = FOLDER) -> dict[str, Subject]:
    """name -> subject, by the files of `folder`."""
    return {file.stem: Subject.read(file, data, output) for file in sorted(folder.glob("*.yaml"))}
