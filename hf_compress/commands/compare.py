"""`hf-compress compare A B C` and `evaluate A`: quality and cost of models on the same texts, in turns."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

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
    output = Path(given["output"])
    with Output(output, shared=True) as place:
        place.check(REPORT_FILES)  # before minutes are spent
    models = {}
    for written in given["models"]:
        name, sources = named(written)
        if name in models:
            raise RecipeError(f"Two models are called {name!r}: name them, as in first={sources[0]}.")
        models[name] = [made_by(source, shared, output) for source in sources]
    names = {field.name for field in fields(EvaluateOptions)} - {"models"}
    options = build(EvaluateOptions, {n: v for n, v in given.items() if n in names}, f"hf-compress {verb}")
    first = next(iter(models.values()))[0]
    data_options = build(DataOptions, shared["data"], "data")
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


def named(written: str) -> tuple[str, list[str]]:
    """`name=a,b` as its parts; a folder or Hub name calls itself by its last part."""
    name, equals, sources = written.partition("=")
    if not equals:
        path = Path(written)
        return (path.parent.name if path.name == "model" and path.parent.name else path.name), [written]
    return name, sources.split(",")


def made_by(source: str, shared: dict[str, Any], output: Path) -> str:
    """The model folder that `source` stands for; a recipe's file is run first, into a folder beside the report."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        recipe = Recipe.from_yaml(source)
        changes = {**shared, "data": {**recipe.data, **shared.get("data", {})}}
        return str(recipe.changed(**changes).run(output / "recipes" / path.stem).model)
    if path.is_dir() and not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        return str(path / "model")  # what `hf-compress run` wrote
    is_path = path.is_absolute() or source.startswith(".") or source.endswith("/") or source.count("/") > 1
    if not path.is_dir() and is_path:  # no name of the Hub
        raise RecipeError(f"There is no model {source}: the folder does not exist.")
    return source
