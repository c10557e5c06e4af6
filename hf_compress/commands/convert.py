"""`hf-compress convert FOLDER OUTPUT --format ...`: the same weights for other readers."""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from hf_compress.commands.parser import Parser
from hf_compress.formats.compressed_tensors.read import load_compressed_tensors
from hf_compress.formats.export import FORMATS, export
from hf_compress.formats.gptq import load_gptq
from hf_compress.measuring.measure import load_model
from hf_compress.recipe.options import RecipeError

OWN = "hf_compress"
READERS = {"compressed-tensors": load_compressed_tensors, "gptq": load_gptq}  # formats of others


def run(verb: str, arguments: list[str]) -> int:
    given = convert_parser().parse_all(arguments)
    source, output = given.model, Path(given.output)
    if given.format not in (OWN, *FORMATS):
        raise RecipeError(f"--format must be one of {', '.join((OWN, *FORMATS))}, got {given.format!r}.")
    if output.exists() and any(output.iterdir()):
        raise RecipeError(f"{output} is not empty. Choose another folder, so that nothing is lost.")
    method = (getattr(AutoConfig.from_pretrained(source), "quantization_config", None) or {}).get("quant_method")
    model = READERS[method](source) if method in READERS else load_model(source, device="cpu")
    if given.format == OWN:
        model.save_pretrained(output)
    else:
        export(model, output, format=given.format)
    if has_tokenizer(source):
        AutoTokenizer.from_pretrained(source).save_pretrained(output)
    sys.stdout.write(f"{given.format}  {output}\n")
    return 0


def convert_parser() -> Parser:
    parser = Parser("hf-compress convert", description="Write a model in another format. GPTQ and "
                    "compressed-tensors checkpoints of others can be read as well.")  # fmt: skip
    parser.add_argument("model", help="A folder or Hub name.")
    parser.add_argument("output", help="An empty or new folder.")
    parser.add_argument("--format", default=OWN, help=f"{', '.join((OWN, *FORMATS))}. Default: {OWN}.")
    return parser


def has_tokenizer(source: str) -> bool:
    folder = Path(source)
    return not folder.is_dir() or (folder / "tokenizer_config.json").is_file()
