"""Turns what a user wrote, in YAML, in Python or on a command line, into the dataclasses that methods take."""

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class RecipeError(ValueError):
    """Something in a recipe or on the command line that its writer can mend."""


MOST_CHARACTERS = 2**20  # of a YAML file
LARGEST_SEED = 2**32 - 1  # of NumPy's generators
MOST_VALUES = 10_000  # that one stands for, however often it refers to what it has said before


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2: `1e-4` is a number, `1:2` (a pair of layers) and `no` are texts."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        start, end = node.start_mark.index, node.end_mark.index  # others were merged in
        own = [key for key, _ in node.value
               if isinstance(key, yaml.ScalarNode) and start <= key.start_mark.index < end]  # fmt: skip
        seen: set[str] = set()
        for key in own:
            if key.value in seen:  # the last would count, and nobody be told
                problem = f"{key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        super().flatten_mapping(node)  # `<<`: a few lines can stand for billions
        if len(node.value) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(problem="it is too large", problem_mark=node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for. Raises RecipeError, with the line, for what is not YAML."""
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{source} has {len(text):,} characters, of at most {MOST_CHARACTERS:,}: it is no recipe.")
    try:
        value = yaml.load(text, Loader=_Loader)
        _check_size(value, source)
        return value
    except RecursionError:
        raise RecipeError(f"{source} is nested too deeply.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{place} is not valid YAML: {getattr(error, 'problem', error)}.") from error


def _check_size(value: Any, source: str) -> None:
    """Counts what is referred to each time; a value that holds itself never ends."""
    left, count = [value], 0
    while left:
        one = left.pop()
        count += 1
        left += [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, (list, set, tuple)) else ()
        if count > MOST_VALUES:
            raise RecipeError(f"{source} stands for more than {MOST_VALUES:,} values: its aliases (*) refer too often.")


def unknown(name: str, known: Iterable[str], what: str) -> RecipeError:
    """The error for a name that is not there, with the nearest one that is."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known are {', '.join(known)}."
    return RecipeError(f"{what} {name!r} is not known. {hint}")


def split_options(given: Mapping[str, Any], classes: Sequence[type], where: str) -> list[dict[str, Any]]:
    """The part of `given` that belongs to each dataclass. Raises RecipeError for an option of none of them."""
    parts: list[dict[str, Any]] = [{} for _ in classes]
    names = [set(option_fields(kind)) for kind in classes]
    for name, value in given.items():
        owner = next((i for i, own in enumerate(names) if name in own), None)
        if owner is None:
            raise unknown(str(name), set().union(*names), f"{where}: the option")
        parts[owner][name] = value
    return parts


def option_fields(kind: type) -> dict[str, Field]:
    """The options of a dataclass by their names in recipes: a field's own, or that of the class's `option_names` where
    its own means something else there, as `method` does. Where checkpoints go is the recipe's to say."""
    own, names = (f for f in fields(kind) if f.init and f.name != "output_dir"), getattr(kind, "option_names", {})
    return {names.get(field.name, field.name): field for field in own}


def build(kind: type, given: Mapping[str, Any], where: str, **fixed: Any) -> Any:
    """A `kind` made of `given`, with values of the types it declares. Raises RecipeError, saying `where`."""
    hints, known = get_type_hints(kind), option_fields(kind)
    values = {}
    for name, value in given.items():
        if name not in known:
            raise unknown(name, known, f"{where}: the option")
        field = known[name]
        try:
            # a default may be a text that would be read as something else, such as report_to="none"
            values[field.name] = value if value == field.default else coerce(value, hints[field.name])
        except ValueError:
            raise RecipeError(f"{where}: {name} must be {describe(hints[field.name])}, got {value!r}.") from None
    missing = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and field.name not in {**values, **fixed}
    ]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} must be given.")
    try:
        return kind(**{**fixed, **values})
    except ValueError as error:
        told, _, rest = str(error).partition(" ")
        written = next((name for name, field in known.items() if field.name == told), told)  # `score`, not `method`
        raise RecipeError(f"{where}: {written} {rest}") from error


def coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint` says: text becomes a number or a truth value, a list joins to a text. Raises ValueError."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_any(value, get_args(hint))
    if origin is Literal:
        return next(choice for choice in get_args(hint) if choice == value) if value in get_args(hint) else _refuse()
    if hint is bool:
        text = str(value).lower()
        return text in TRUE if text in (*TRUE, *FALSE) else _refuse()
    if hint is int:
        number = float(value) if not isinstance(value, (bool, type(None), list, dict)) else _refuse()
        return int(number) if number.is_integer() else _refuse()
    if hint is float:
        return float(value) if not isinstance(value, (bool, type(None), list, dict)) else _refuse()
    if hint is str:
        if isinstance(value, (list, tuple)) and not any(isinstance(part, (list, tuple, dict)) for part in value):
            return ",".join(map(str, value))
        return str(value) if isinstance(value, (str, int, float)) else _refuse()
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        (inner, *_) = get_args(hint) or (None,)
        return [coerce(part, inner) for part in parts] if inner is not None else list(parts)
    if origin is dict or hint is dict:
        return dict(value) if isinstance(value, Mapping) else _refuse()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return value


def _coerce_any(value: Any, hints: Sequence[Any]) -> Any:
    if value is None or str(value).lower() in ("none", "null"):
        return None if type(None) in hints else _refuse()
    order = sorted((h for h in hints if h is not type(None)), key=lambda h: h is str)  # anything is a text
    for hint in order:
        try:
            return coerce(value, hint)
        except ValueError:
            continue
    return _refuse()


def _refuse() -> Any:
    raise ValueError


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError for a number that generators cannot begin with."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{name} must lie between 0 and {LARGEST_SEED}, got {seed}.")


def describe(hint: Any) -> str:
    """A type in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint in names:
        return names[hint]
    kind = get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(choice.value) for choice in kind)}"
    return {dict: "a mapping", list: "a list"}.get(kind, getattr(kind, "__name__", str(kind)))
