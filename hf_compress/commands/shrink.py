"""`hf-compress shrink MODEL --data FILE --speedup 10 --runtime openvino`: one dial."""

import sys

from hf_compress.commands.parser import Parser, add_options
from hf_compress.commands.run import command_line
from hf_compress.recipe.data import DataOptions
from hf_compress.recipe.options import RecipeError, option_fields, read_yaml
from hf_compress.recipe.recipe import REPORT_FILES
from hf_compress.recipe.tasks.table import TASKS
from hf_compress.report.tables import fitted, main_rows
from hf_compress.shrinking.run import RUNTIMES_OF_SHRINK, TOKENS, Shrunk, shrink
from hf_compress.shrinking.wish import KINDS

MISSED = 3  # the exit code where all was made, and the wish was not met


def run(verb: str, arguments: list[str]) -> int:
    given = vars(shrink_parser().parse_all(arguments))
    data = {name: given[name] for name in option_fields(DataOptions) if name in given} | {"source": given["data"]}
    done = shrink(
        given["model"], data, output=given["output"], runtime=given["runtime"], plan=given["plan"], seed=given["seed"],
        tokens=given["tokens"], task=given["task"],
        changes={k: read_yaml(v, "--set") for k, v in map(_pair, given["set"])},
        command=command_line(verb, arguments), **{kind: given[kind] for kind in KINDS},
    )  # fmt: skip
    show(done, given["output"])
    return 0 if done.is_met or done.report is None else MISSED


def _pair(change: str) -> tuple[str, str]:
    name, equals, value = change.partition("=")
    if not equals:
        raise RecipeError(f"--set takes OPTION=VALUE, such as num_train_epochs=1, got {change!r}.")
    return name.rpartition(".")[2], value


def show(done: Shrunk, output: str) -> None:
    if done.report is None:
        sys.stdout.write(f"{done.plan}\n")
        return
    kept = "reached" if done.is_met else "missed"
    lines = [f"asked   {done.wish.text(done.wish.value)}", f"{kept}  {done.wish.text(done.reached)}"]
    lines += ["", *fitted(main_rows(done.report)), ""]
    lines += [f"model   {done.model}", f"report  {output}/{next(f for f in REPORT_FILES if f.endswith('.html'))}"]
    sys.stdout.write("\n".join(lines) + "\n")


def shrink_parser() -> Parser:
    parser = Parser(
        "hf-compress shrink",
        description="Make a model as fast or as small as you say, and as accurate as can be.",
        epilog="Exit code 3: everything was made, but the wish was not met.",
    )
    parser.add_argument("model", help="A folder or Hub name; without a fitting head it is fine-tuned first.")
    parser.add_argument("--data", required=True, help="Texts and labels; rows without a label are learned from, too.")
    parser.add_argument("--output", required=True, help="Folder for models and reports.")
    wishes = parser.add_argument_group("what is wanted: one of")
    for kind, text in KINDS.items():
        wishes.add_argument(f"--{kind}", type=float, default=None, metavar="N", help=text.capitalize() + ".")
    parser.add_argument("--runtime", default="torch", help=f"Where it will run: {', '.join(RUNTIMES_OF_SHRINK)}.")
    parser.add_argument("--task", default=None, help=f"{', '.join(TASKS)}. By default what the model's class and the "
                        "data's columns say.")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="Measure and say what would be done, no more.")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"Of the text that is timed. Default: {TOKENS}.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything that draws. Default: 0.")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE",
                        help="Change an option of the trainings, e.g. --set num_train_epochs=1.")  # fmt: skip
    add_options(parser, DataOptions, "data", hide=("source",))
    return parser
