"""`hf-compress picture FOLDER`: what is left of each layer, from the saved model, without running it."""

import json
import sys
from pathlib import Path

from hf_compress.commands.compare import made_by
from hf_compress.commands.parser import Parser
from hf_compress.files.whole import write_whole
from hf_compress.measuring.measure import load_model
from hf_compress.recipe.options import RecipeError
from hf_compress.report.layers import Full, by_layer, layer_facts, layers_svg

MARK = 'data-made-by="hf_compress"'  # what has it may be replaced


def run(verb: str, arguments: list[str]) -> int:
    given = picture_parser().parse_all(arguments)
    output = Path(given.output)
    if output.suffix.lower() != ".svg":
        raise RecipeError(f"The picture is an SVG: call it {output.with_suffix('.svg')}, not {output}.")
    if output.exists() and MARK not in output.read_text(encoding="utf-8", errors="replace")[:200]:
        raise RecipeError(
            f"{output} is there, and no picture of ours. Choose another --output, so that nothing is lost."
        )
    model = load_model(made_by(given.model, {}, output.parent), device="cpu")
    before = layer_facts(load_model(given.before, device="cpu")) if given.before else layer_facts(model)
    values = None
    if given.sensitivity:
        try:
            values = by_layer(model, json.loads(Path(given.sensitivity).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, AttributeError) as error:
            raise RecipeError(
                f"{given.sensitivity} must hold a JSON mapping, module name to number: {error}."
            ) from error
    picture = layers_svg(
        layer_facts(model), title=f"Layers of {Path(given.model).name}", sensitivity=values,
        full=Full.of([before]) if before else None,
    )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, picture.replace("<svg ", f"<svg {MARK} ", 1))
    sys.stdout.write(f"{output}\n")
    return 0


def picture_parser() -> Parser:
    parser = Parser("hf-compress picture", description="Draw heads, neurons, bits, stored blocks and zeros of each "
                    "layer of a saved model, without running it.")  # fmt: skip
    parser.add_argument("model", help="A folder or Hub name.")
    parser.add_argument("--output", default="layers.svg", help="An SVG file. Default: layers.svg.")
    parser.add_argument("--before", default=None, help="The model as it was, whose widths are the full ones.")
    parser.add_argument("--sensitivity", default=None, help="JSON of hfc.hessian_sensitivity, drawn beside the rest.")
    return parser
