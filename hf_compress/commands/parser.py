"""Command lines made from dataclasses of options: all of them are taken, and those that matter are shown."""

import argparse
import difflib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import Field
from typing import Any, NoReturn, get_type_hints

from transformers import TrainingArguments

from hf_compress.recipe.options import RecipeError, describe, option_fields

USUAL = (  # options of TrainingArguments that `--help` shows; `--help-all` shows every one
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "bf16", "seed", "use_cpu",
    "save_steps", "report_to",
)  # fmt: skip

WIDTH = 80  # of a terminal
EXAMPLES = {  # verb -> a line that `--help` ends with
    "run": "run few-labels --model bert-base-uncased --data reviews.csv --output runs/reviews",
    "shrink": "shrink teacher/ --data reviews.csv --speedup 10 --runtime openvino --output small",
    "fine-tune": "fine-tune --model bert-base-uncased --data reviews.csv --num_train_epochs 3 --output runs/teacher",
    "distill": "distill --method tinybert --model teacher/ --num_hidden_layers 3 --data reviews.csv --output runs/half",
    "prune": "prune --method structure --layers 0.5 --heads 0.25 --model teacher/ --data reviews.csv --output runs/cut",
    "quantize": "quantize --method gptq --bits 4 --model student/ --data reviews.csv --output runs/packed",
    "evaluate": "evaluate student/ --data reviews.csv --output report",
    "compare": "compare teacher=teacher/ student=seed-0/,seed-1/ --data reviews.csv --output report",
    "publish": "publish runs/reviews --repo_id me/small-bert --dry_run",
    "convert": "convert runs/reviews/model exported --format openvino",
    "picture": "picture runs/reviews/model --before teacher/ --output layers.svg",
    "vary": "vary mine.yaml --vary distil.alpha=0.3,0.7 --model teacher/ --data reviews.csv --output runs/varied",
    "tune": "tune --shapes 4096x4096,11008x4096 --bits 4",
    "doctor": "doctor",
    "completion": "completion bash > ~/.local/share/bash-completion/completions/hf-compress",
}


class Parser(argparse.ArgumentParser):
    """Takes `--some_option` and `--some-option` alike, abbreviates nothing, and names the nearest of unknown ones."""

    def __init__(self, *args: Any, **kwargs: Any):
        kept = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}  # lists in the epilog
        description = textwrap.fill(kwargs.pop("description", ""), WIDTH)
        super().__init__(*args, **{**kept, "description": description, **kwargs})
        if example := EXAMPLES.get(self.prog.rpartition(" ")[2]):
            self.epilog = "\n\n".join([*[self.epilog] * bool(self.epilog), f"Example:\n  hf-compress {example}"])

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options that were given. Raises RecipeError for others."""
        known, rest = self.parse_known_args([_with_underscores(word) for word in arguments])
        if rest:
            names = [name for action in self._actions for name in action.option_strings]
            word = rest[0].partition("=")[0]
            nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5) if word.startswith("-") else []
            hint = f"Did you mean {nearest[0]}?" if nearest else f"See {self.prog} --help."
            raise RecipeError(f"{word} is not known. {hint}")
        return known

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}. See {self.prog} --help.")


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def add_options(parser: Parser, kind: type, title: str, *, help_all: bool = False, hide: Sequence[str] = ()) -> None:
    """Add an option for each field of a dataclass. Values stay texts: `build` gives them their types."""
    own, inherited = parser.add_argument_group(title), None
    hints, words = get_type_hints(kind), _documented(kind)
    training = set(option_fields(TrainingArguments)) if issubclass(kind, TrainingArguments) else set()
    for name, field in option_fields(kind).items():
        if name in hide or any(f"--{name}" in action.option_strings for action in parser._actions):
            continue
        group, shown = own, True
        if name in training and not _is_own(kind, name):
            inherited = inherited or parser.add_argument_group("training (options of TrainingArguments)")
            group, shown = inherited, help_all or name in USUAL
        hint = hints[field.name]
        text = _help(field, hint, words.get(field.name)) if shown else argparse.SUPPRESS
        group.add_argument(
            f"--{name}", dest=name, default=argparse.SUPPRESS, help=text, metavar=_metavar(hint),
            **({"nargs": "?", "const": "true"} if hint is bool else {}),
        )  # fmt: skip


def _is_own(kind: type, name: str) -> bool:
    """Whether a method's config, and not TrainingArguments, says what `name` means."""
    return any(
        name in base.__dict__.get("__annotations__", {})
        for base in kind.__mro__
        if not issubclass(TrainingArguments, base)
    )


def _help(field: Field, hint: Any, documented: str | None) -> str:
    text = field.metadata.get("help") or documented or describe(hint).capitalize() + "."
    text = " ".join(text.split())
    default = field.default if not callable(field.default) else None
    if default is not None and not isinstance(default, type(Field)) and "MISSING" not in repr(default):
        text += f" Default: {getattr(default, 'value', default)}."
    return text.replace("%", "%%")


def _metavar(hint: Any) -> str:
    names = {bool: "true|false", int: "N", float: "X"}
    return names.get(hint, "VALUE")


def _documented(kind: type) -> dict[str, str]:
    """Fields described in a docstring as a column of names and a column of text."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        lines = inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines()
        name = None
        for line in lines:
            if match := re.match(r"([a-z]\w*) {2,}(\S.*)", line):
                name = match[1]
                found.setdefault(name, match[2])
            elif name and re.match(r" {2,}\S", line):
                found[name] += " " + line.strip()
            else:
                name = None
    return found
