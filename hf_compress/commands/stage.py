"""`hf-compress fine-tune | distill | prune | quantize`: one stage of a recipe, with every option of its method."""

from transformers import TrainingArguments

from hf_compress.commands.parser import Parser, add_options
from hf_compress.commands.run import add_shared, command_line, shared_arguments, show
from hf_compress.recipe.options import option_fields
from hf_compress.recipe.recipe import Recipe
from hf_compress.recipe.stage import Method
from hf_compress.recipe.stages import ALIASES, DEFAULT_METHODS, KINDS, StageOptions, method_of
from hf_compress.recipe.tasks.embedding import Embeddings

DESCRIPTIONS = {
    "fine-tune": "Train a model on your labels or texts; one without a head for them gets it.",
    "distil": "Train a student to follow its teacher. Methods: {methods}.",
    "prune": "Cut what matters least. Methods: {methods}.",
    "quantize": "Store weights in few bits. Methods: {methods}.",
}


def run(verb: str, arguments: list[str]) -> int:
    kind = ALIASES.get(verb, verb)
    chosen = _chosen(arguments, "method")
    if chosen is None and kind == "distil" and _chosen(arguments, "task") == Embeddings.name:
        chosen = Embeddings.name
    method = method_of(kind, chosen, f"hf-compress {verb}")
    parser = stage_parser(verb, method, help_all="--help-all" in arguments)
    given = vars(parser.parse_all(["--help" if word == "--help-all" else word for word in arguments]))
    names = {name for options in method.options for name in option_fields(options)}
    options = {name: value for name, value in given.items() if name in names}
    stages = [{kind: options if kind == method.name else {"method": method.name, **options}}]
    if given.get("evaluate"):
        stages.append({"evaluate": {}})
    recipe = Recipe(stages, name=verb, **shared_arguments(given))
    result = recipe.run(given["output"], command=command_line(verb, arguments))
    show(result)
    return 0


def stage_parser(verb: str, method: Method, *, help_all: bool = False) -> Parser:
    kind = method.kind
    parser = Parser(
        f"hf-compress {verb}",
        description=DESCRIPTIONS[kind].format(methods=", ".join(methods(kind))),
        epilog="--help-all shows every option of TrainingArguments; all are taken." if method.trains else None,
    )
    if kind in DEFAULT_METHODS:
        parser.add_argument("--method", default=method.name, help=f"Default: {DEFAULT_METHODS[kind]}.")
    parser.add_argument("--evaluate", action="store_true", help="Compare the result with what it began with.")
    add_shared(parser)
    for options in method.options:
        if options is not StageOptions:
            title = "training" if options is TrainingArguments else f"{method.name}"
            add_options(parser, options, "student" if "Student" in options.__name__ else title, help_all=help_all)
    return parser


def methods(kind: str) -> list[str]:
    return [name for name in KINDS[kind] if name != "qat"]  # joins another training: in recipes only


def _chosen(arguments: list[str], option: str) -> str | None:
    """The value of an option, before it is known which options there are."""
    for i, word in enumerate(arguments):
        if word == f"--{option}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(f"--{option}="):
            return word.partition("=")[2]
    return None
