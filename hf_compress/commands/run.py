"""`hf-compress run NAME_OR_FILE`: a whole recipe."""

import argparse
import logging
import shlex
import sys

from hf_compress.commands.parser import Parser, add_options
from hf_compress.recipe.data import DataOptions
from hf_compress.recipe.options import RecipeError, read_yaml
from hf_compress.recipe.recipe import Recipe, RecipeResult, ready_recipes
from hf_compress.training.ranks import is_main

logger = logging.getLogger(__name__)


def run(verb: str, arguments: list[str]) -> int:
    parser = run_parser()
    given = vars(parser.parse_all(arguments))
    result = recipe_of(given).run(given["output"], command=command_line(verb, arguments))
    show(result)
    return 0


def run_parser() -> Parser:
    recipes = ready_recipes()
    width = max(map(len, recipes))
    ready = "\n".join(f"  {name:{width}}  {text}" for name, text in recipes.items())
    parser = Parser("hf-compress run", description="Run a recipe. What ran before on the same things is kept.",
                    epilog=f"Recipes that come with the package:\n{ready}")  # fmt: skip
    parser.add_argument("recipe", help="A YAML file, or the name of a recipe that comes with the package.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.OPTION=VALUE",
        help="Change an option of a stage, e.g. --set distil.num_train_epochs=1. May be repeated.",
    )  # fmt: skip
    add_shared(parser)
    return parser


def add_shared(parser: Parser, *, output: str | None = None) -> None:
    """What every verb that makes a model takes: where from, on which texts, where to."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", default=argparse.SUPPRESS, help="A folder or Hub name to begin with.")
    group.add_argument("--data", default=argparse.SUPPRESS, help="A CSV, JSON or text file, a folder of train, "
                       "validation and test files, `bbc-news`, or a dataset of the Hub.")  # fmt: skip
    group.add_argument("--output", required=output is None, default=output, help="Folder for models and reports.")
    group.add_argument("--task", default=argparse.SUPPRESS, help="sequence-classification or causal-lm.")
    group.add_argument("--recipe_seed", default=argparse.SUPPRESS, metavar="N", help="Seed of all stages. Default: 0.")
    add_options(parser, DataOptions, "data", hide=("source",))


def shared_arguments(given: dict) -> dict:
    """Arguments of `Recipe` from a command line with `add_shared`."""
    data = {name: given[name] for name in ("text_column", "label_column", "max_length", "max_examples", "dataset_name")
            if name in given}  # fmt: skip
    if "data" in given:
        data["source"] = given["data"]
    shared = {name: given[name] for name in ("model", "task") if name in given}
    return {**shared, **({"seed": given["recipe_seed"]} if "recipe_seed" in given else {}), "data": data}


def recipe_of(given: dict) -> Recipe:
    """The named recipe, with what the command line says in place of what the file says."""
    recipe = Recipe.from_yaml(given["recipe"])
    shared = shared_arguments(given)
    shared["data"] = {**recipe.data, **shared["data"]}
    return recipe.changed(stages=changed_stages(recipe.written, given.get("set", [])), **shared)


def changed_stages(stages: list, changes: list[str]) -> list:
    """`stages` as written, with `STAGE.OPTION=VALUE` put in. Raises RecipeError for stages that are not there."""
    for change in changes:
        target, equals, value = change.partition("=")
        stage, dot, option = target.rpartition(".")
        if not (equals and dot):
            raise RecipeError(f"--set takes STAGE.OPTION=VALUE, such as distil.alpha=0.7, got {change!r}.")
        stages = [_changed(entry, stage, option, read_yaml(value, "--set")) for entry in stages]
        if not any(_is_called(part, stage) for entry in stages for part in _parts(entry)):
            names = [name for entry in stages for part in _parts(entry) for name in _names(part)]
            raise RecipeError(f"--set {change}: there is no stage {stage!r}, only {', '.join(dict.fromkeys(names))}.")
    return stages


def _parts(entry) -> list:
    if isinstance(entry, dict) and "together" in entry:
        inner = entry["together"]
        return list(inner["stages"] if isinstance(inner, dict) else inner)
    return [entry]


def _names(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    ((kind, options),) = entry.items()
    return [name for name in (kind, (options or {}).get("name"), (options or {}).get("method")) if name]


def _is_called(entry, name: str) -> bool:
    return name in _names(entry)


def _changed(entry, stage: str, option: str, value):
    if isinstance(entry, dict) and "together" in entry:
        inner = entry["together"]
        parts = [_changed(part, stage, option, value) for part in _parts(entry)]
        return {"together": {**inner, "stages": parts} if isinstance(inner, dict) else parts}
    if not _is_called(entry, stage):
        return entry
    ((kind, options),) = ({entry: {}} if isinstance(entry, str) else entry).items()
    return {kind: {**(options or {}), option: value}}


def command_line(verb: str, arguments: list[str]) -> str:
    return shlex.join(["hf-compress", verb, *arguments])


def show(result: RecipeResult) -> None:
    """Say where things are, once for all processes; the table of the last evaluation first."""
    if not is_main():
        return
    table = result.output / "report.md"
    lines = [table.read_text(encoding="utf-8").partition("\n\n")[0], ""] if table.is_file() else []
    lines.append(f"model   {result.model}")
    lines += [f"{name:8}{result.output / file}" for name, file in (("report", "report.html"), ("table", "report.md"))
              if (result.output / file).is_file()]  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
