"""`hf-compress run NAME_OR_FILE`: a whole recipe."""

import argparse
import copy
import logging
import sys
from typing import NamedTuple

from hf_compress.commands.parser import Parser, add_options
from hf_compress.recipe.data import DataOptions
from hf_compress.recipe.options import RecipeError, option_fields, read_yaml
from hf_compress.recipe.recipe import Recipe, RecipeResult, ready_recipes
from hf_compress.recipe.stages import ALIASES, DEFAULT_METHODS, name_of, numbered
from hf_compress.recipe.tasks.table import TASKS
from hf_compress.report.privacy import public_command
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
    group.add_argument("--task", default=argparse.SUPPRESS, help=f"{', '.join(TASKS)}. By default what the model's "
                       "class says, or where it may get any head, the data's columns.")  # fmt: skip
    group.add_argument("--recipe_seed", default=argparse.SUPPRESS, metavar="N", help="Seed of all stages. Default: 0.")
    add_options(parser, DataOptions, "data", hide=("source",))


def shared_arguments(given: dict) -> dict:
    """Arguments of `Recipe` from a command line with `add_shared`."""
    data = {name: given[name] for name in option_fields(DataOptions) if name in given}
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
    """`stages` as written, with `STAGE.OPTION=VALUE` put in; STAGE is a stage's name, or its kind or method where one
    stage alone has it. Raises RecipeError for stages that are not there, and for several."""
    stages = copy.deepcopy(stages)
    for change in changes:
        target, equals, value = change.partition("=")
        stage, dot, option = target.rpartition(".")
        if not (equals and dot):
            raise RecipeError(f"--set takes STAGE.OPTION=VALUE, such as distil.alpha=0.7, got {change!r}.")
        stage, parts = ALIASES.get(stage, stage), _parts(stages)
        named = [part for part in parts if part.name == stage] or [part for part in parts if stage in part.also]
        if len(named) != 1:
            names = ", ".join(part.name for part in named or parts)
            what = (
                f"{len(named)} stages are called {stage!r}: say which,"
                if named
                else f"there is no stage {stage!r}, only"
            )
            raise RecipeError(f"--set {change}: {what} {names}.")
        named[0].options[option] = read_yaml(value, "--set")
    return stages


class _Part(NamedTuple):
    """A stage as written, or a part of one that works together: `options` can be changed in their place."""

    name: str
    also: set[str | None]  # its kind and method, and its own name within another
    options: dict


def _parts(stages: list) -> list[_Part]:
    """The stages of a list, which is changed so that each is a mapping of its kind to its options.

    Named as `read_stages` names them; a part of a stage that works together has that stage's name before its own.
    """
    found = []
    for number, entry in enumerate(stages):
        ((kind, options),) = ({entry: {}} if isinstance(entry, str) else entry).items()
        if kind == "together":
            inner = options["stages"] if isinstance(options, dict) else options
            own = options.get("name") if isinstance(options, dict) else None
            found.append((own or kind, _parts(inner)))
            continue
        stages[number] = {kind: options or {}}
        kind, given = ALIASES.get(kind, kind), stages[number][kind]
        method = given.get("method") or DEFAULT_METHODS.get(kind)
        name = name_of(kind, method, given.get("name"))
        found.append((name, [_Part("", {kind, method, given.get("name")}, given)]))
    parts = []
    for name, (_, inner) in zip(numbered([name for name, _ in found]), found, strict=True):
        for part in inner:
            parts.append(part._replace(name=f"{name}.{part.name}" if part.name else name, also=part.also | {part.name}))
    return parts


def command_line(verb: str, arguments: list[str]) -> str:
    """For reports: without the folders of files, and without tokens."""
    return public_command(["hf-compress", verb, *arguments])


def show(result: RecipeResult) -> None:
    """Say where things are, once for all processes; the table first, where an evaluation is of this very model."""
    if not is_main():
        return
    lines = []
    if result.report is not None:
        lines += [(result.report / "report.md").read_text(encoding="utf-8").partition("\n\n")[0], ""]
    lines.append(f"model   {result.model}")
    lines += [f"{format:7} {folder}" for format, folder in result.exports.items()]
    if result.report is not None:
        lines += [f"report  {result.report / 'report.html'}", f"table   {result.report / 'report.md'}"]
    sys.stdout.write("\n".join(lines) + "\n")
