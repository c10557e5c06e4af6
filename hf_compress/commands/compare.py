"""`hf-compress compare A B C` and `evaluate A`: quality and cost of models on the same texts, in turns."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_compress.checkpoint.opening import check_source, model_folder
from hf_compress.commands.parser import Parser, add_options
from hf_compress.commands.run import add_shared, command_line, shared_arguments
from hf_compress.files.output import Output
from hf_compress.recipe.data import DataOptions, RecipeData
from hf_compress.recipe.evaluate import EvaluateOptions, evaluate
from hf_compress.recipe.options import RecipeError, build
from hf_compress.recipe.recipe import REPORT_FILES, Recipe
from hf_compress.recipe.tasks.table import task_of


def run(verb: str, arguments: list[str]) -> int:
    parser = compare_parser(verb)
    given = vars(parser.parse_all(arguments))
    if verb == "evaluate" and len(given["models"]) > 1:
        raise RecipeError("evaluate looks at one model; hf-compress compare takes several.")
    shared = shared_arguments(given)
    if not shared["data"].get("source"):
        raise RecipeError("--data must be given: the texts that models are compared on.")
    names = {field.name for field in fields(EvaluateOptions)} - {"models"}
    options = build(EvaluateOptions, {n: v for n, v in given.items() if n in names}, f"hf-compress {verb}")
    data_options = build(DataOptions, shared["data"], "data")
    output, written = Path(given["output"]), _by_name(given["models"])
    for source in (source for sources in written.values() for source in sources if not is_recipe(source)):
        made_by(source, shared, output)  # says what is no model, before there is a folder
    with Output(output, shared=True) as place:
        place.check(REPORT_FILES)  # before minutes are spent
    models = {name: [made_by(source, shared, output) for source in sources] for name, sources in written.items()}
    first = next(iter(models.values()))[0]
    data = RecipeData(data_options, shared.get("task") or task_of(first, data_options), needs_labels=True)
    data.tell()
    report = evaluate(options, models, data, command_line(verb, arguments))
    report.save(output)
    sys.stdout.write(f"{report.table()}\n\nreport  {output / 'report.html'}\n")
    return 0


def compare_parser(verb: str) -> Parser:
    parser = Parser(
        f"hf-compress {verb}",
        description="Measure quality, size and speed of models on the same texts, in turns.",
        epilog="The first model is the reference. A=seed1,seed2 holds the seeds of one thing under the name A.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="A folder, what a recipe wrote, a Hub name, or a recipe to run "
        "first; NAME=MODEL names it.",
    )  # fmt: skip
    add_shared(parser, output="report")
    add_options(parser, EvaluateOptions, "measuring", hide=("models",))
    return parser


def _by_name(words: list[str]) -> dict[str, list[str]]:
    models: dict[str, list[str]] = {}
    for word in words:
        name, sources = named(word)
        if name in models:
            raise RecipeError(f"Two models are called {name!r}: name them, as in first={sources[0]}.")
        models[name] = sources
    return models


def is_recipe(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def named(written: str) -> tuple[str, list[str]]:
    """`name=a,b` as its parts; a folder or Hub name calls itself by its last part."""
    name, equals, sources = written.partition("=")
    if not equals:
        path = Path(written)
        path = path if path.name not in ("", "..") else path.resolve()  # `.` has a name, too
        return (path.parent.name if path.name == "model" and path.parent.name else path.name), [written]
    if not name or not all(sources.split(",")):
        raise RecipeError(f"A model is named as NAME=MODEL, or NAME=SEED,SEED, got {written!r}.")
    return name, sources.split(",")


def made_by(source: str, shared: dict[str, Any], output: Path) -> str:
    """The model folder that `source` stands for; a recipe's file is run first, into a folder beside the report."""
    path = Path(source)
    if is_recipe(source):
        recipe = Recipe.from_yaml(source)
        changes = {**shared, "data": {**recipe.data, **shared.get("data", {})}}
        return str(recipe.changed(**changes).run(output / "recipes" / path.stem).model)
    found = str(model_folder(source))
    check_source(found)
    return found if found != str(path) else source
