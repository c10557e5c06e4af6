"""Methods of the board: recipe files that all train on as many texts, or on none."""

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from hf_compress.recipe import Recipe
from hf_compress.recipe.fingerprints import digest
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.stage import Stage

FOLDER = Path(__file__).parent / "recipes"
TEXTS = 1600  # that the stages of one recipe may train on together, repetitions counted: 50 steps of 32


@dataclass(frozen=True)
class Method:
    """A recipe, called by its file's name; its folder says of what kind it is."""

    name: str
    kind: str
    recipe: Recipe
    trained_texts: int

    @classmethod
    def read(cls, file: Path, texts: int = TEXTS) -> "Method":
        """Raises RecipeError, naming the file, for what is no recipe, or one that does not keep to the terms."""
        try:
            recipe = Recipe.from_yaml(file)
            trained = sum(trained_texts(stage) for stage in recipe.stages)
        except ValueError as error:
            raise RecipeError(f"{file.parent.name}/{file.name}: {error}") from error
        where = f"{file.parent.name}/{file.name}"
        if recipe.model or recipe.data.get("source") or recipe.seed:
            raise RecipeError(f"{where}: model, data and seed are the board's to say; leave them out.")
        if found := [stage.kind for stage in recipe.stages if not stage.makes_model]:
            raise RecipeError(f"{where}: leave out the stage {found[0]}: the board measures all models alike.")
        if trained > texts:
            raise RecipeError(f"{where} trains on {trained:,} texts, of at most {texts:,} for every method.")
        return cls(file.stem, file.parent.name, recipe, trained)

    @property
    def digest(self) -> str:
        """Of what the recipe does; not of its name and description."""
        return digest([self.recipe.written, {k: v for k, v in self.recipe.data.items()}])


def trained_texts(stage: Stage) -> int:
    """Texts that a stage trains on, repetitions counted. Raises RecipeError where it gives no number of steps."""
    if not stage.method.trains:
        return 0
    arguments: TrainingArguments = stage.own
    if arguments.max_steps < 1:
        raise RecipeError(f"the stage {stage.name} must say max_steps: every method trains on as many texts.")
    return arguments.max_steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def find_methods(folder: Path = FOLDER, texts: int = TEXTS) -> dict[str, Method]:
    """name -> method, by the files of the folders in `folder`. Raises RecipeError for two of one name."""
    found: dict[str, Method] = {}
    for file in sorted(folder.glob("*/*.yaml")):
        method = Method.read(file, texts)
        if method.name in found:
            raise RecipeError(f"{file.parent.name}/{file.name}: {found[method.name].kind} has a recipe of that name.")
        found[method.name] = method
    return found
