"""`hf-compress tune`: measures the tiles of the low-bit kernels on the GPU at hand, and keeps the fastest."""

import re
import sys
from importlib import import_module
from pathlib import Path

from hf_compress.commands.parser import Parser
from hf_compress.engines.ops import implementation
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.measuring.measure import load_model
from hf_compress.model.anatomy import in_features, is_projection, out_features
from hf_compress.recipe.options import RecipeError


def run(verb: str, arguments: list[str]) -> int:
    given = tune_parser().parse_all(arguments)
    if (given.model is None) == (given.shapes is None):
        raise RecipeError("give --model, whose layers are measured, or --shapes such as 4096x4096,11008x4096.")
    shapes = shapes_of(given.shapes) if given.model is None else shapes_in(given.model)
    sys.stderr.write(f"{len(shapes)} shapes: {', '.join(f'{rows}x{columns}' for rows, columns in shapes)}\n")
    path = tune_linear(shapes, bits=given.bits, group_size=given.group_size)
    sys.stdout.write(f"table  {path}\n")
    return 0


def tune_linear(shapes: list[tuple[int, int]], **options) -> Path:
    """The kernels' own measurement; returns the table's path."""
    return import_module(f"{implementation().__name__}.tune").tune_linear(shapes, **options)


def shapes_of(text: str) -> list[tuple[int, int]]:
    """(out_features, in_features) of each shape. Raises RecipeError for what is none."""
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", word)]:
        raise RecipeError(f"--shapes are out_features x in_features, such as 4096x4096, got {wrong[0]!r}.")
    return [tuple(map(int, word.split("x"))) for word in words]


def shapes_in(source: str) -> list[tuple[int, int]]:
    """The shapes of a model's linear maps, each once; of its packed ones where it has any."""
    modules = list(load_model(source, device="cpu").modules())
    packed = [module for module in modules if isinstance(module, PackedLinear)]
    maps = packed or [module for module in modules if is_projection(module)]
    return sorted({(out_features(module), in_features(module)) for module in maps})


def tune_parser() -> Parser:
    parser = Parser("hf-compress tune", description="Measure tile configurations of the low-bit kernels on this "
                    "machine's GPU and keep the fastest for each shape. Kernels look there first. Without a table the "
                    "built-in rules apply.")  # fmt: skip
    parser.add_argument("--model", help="A folder or Hub name: the shapes of its linear maps are measured.")
    parser.add_argument("--shapes", help="out_features x in_features, with commas: 4096x4096,11008x4096.")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="Default: 4.")
    parser.add_argument("--group_size", type=int, default=128, help="Weights that share a scale. Default: 128.")
    return parser
