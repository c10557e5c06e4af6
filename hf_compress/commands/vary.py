"""`hf-compress vary RECIPE --vary STAGE.OPTION=A,B,C`: every combination, what they share made once."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from hf_compress.commands.parser import Parser
from hf_compress.commands.run import add_shared, changed_stages, command_line, shared_arguments
from hf_compress.files.output import Output
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.recipe import Recipe

COLUMNS = ("quality", "byte_rate", "throughput_speed_up")


def run(verb: str, arguments: list[str]) -> int:
    given = vars(vary_parser().parse_all(arguments))
    recipe = Recipe.from_yaml(given["recipe"])
    shared = shared_arguments(given)
    shared["data"] = {**recipe.data, **shared["data"]}
    choices = [variations(text) for text in given["vary"]]
    stages = on_validation(recipe.written)
    output, trials = Path(given["output"]), []
    combinations = list(itertools.product(*choices))
    variants = [recipe.changed(stages=changed_stages(stages, list(changes)), **shared) for changes in combinations]
    with Output(output) as place:
        place.check(["trials.json"])
    for number, (changes, variant) in enumerate(zip(combinations, variants, strict=True), 1):
        sys.stderr.write(f"trial {number} of {len(combinations)}: {' '.join(changes)}\n")
        result = variant.run(output, command=command_line(verb, arguments))
        figures = next(record for record in reversed(result.stages) if record["kind"] == "evaluate")["figures"]
        trials.append({"changes": list(changes), **list(figures.values())[-1]})
        with Output(output) as place:
            place.write({"trials.json": json.dumps(trials, indent=2)})
    best = max(trials, key=lambda trial: trial["quality"])
    variants[trials.index(best)].run(output)  # all of it is kept already: the best model takes its place
    sys.stdout.write(f"{table(trials, best)}\n\nbest on the validation texts: {' '.join(best['changes'])}\n"
                     f"model   {output / 'model'}\ntrials  {output / 'trials.json'}\n")  # fmt: skip
    return 0


def vary_parser() -> Parser:
    parser = Parser("hf-compress vary", description="Run a recipe with every combination of some options, and keep "
                    "the model that is best on the validation texts. Stages that trials share run once.")  # fmt: skip
    parser.add_argument("recipe", help="A YAML file, or the name of a recipe that comes with the package.")
    parser.add_argument(
        "--vary", action="append", required=True, metavar="STAGE.OPTION=A,B",
        help="Values to try, e.g. --vary distil.alpha=0.3,0.7. May be repeated.",
    )  # fmt: skip
    add_shared(parser)
    return parser


def variations(text: str) -> list[str]:
    """`distil.alpha=0.3,0.7` as one change for each value."""
    target, equals, values = text.partition("=")
    if not equals or "." not in target or not all(values.split(",")):
        raise RecipeError(f"--vary takes STAGE.OPTION=A,B,C, such as distil.alpha=0.3,0.7, got {text!r}.")
    return [f"{target}={value}" for value in values.split(",")]


def on_validation(stages: list[Any]) -> list[Any]:
    """The stages, with the last evaluation on the validation texts: choosing by the test texts would flatter."""
    kept = [stage for stage in stages if not {"export", "publish"} & set([stage] if isinstance(stage, str) else stage)]
    last = next((i for i in reversed(range(len(kept))) if kept[i] == "evaluate" or "evaluate" in kept[i]), None)
    options = {} if last is None or isinstance(kept[last], str) else kept[last]["evaluate"] or {}
    kept = kept if last is None else [*kept[:last], *kept[last + 1 :]]
    return [*kept, {"evaluate": {**options, "split": "validation"}}]


def table(trials: list[dict[str, Any]], best: dict[str, Any]) -> str:
    rows = [["", *COLUMNS, "changes"]]
    for trial in trials:
        rows.append(["*" if trial is best else "", *(f"{trial[c]:.4g}" for c in COLUMNS), " ".join(trial["changes"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
