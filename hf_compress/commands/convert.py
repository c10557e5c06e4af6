"""`hf-compress convert FOLDER OUTPUT --format ...`: the same weights for other readers."""

import json
import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from hf_compress.commands.compare import made_by
from hf_compress.commands.parser import Parser
from hf_compress.files.whole import check_free, whole_folder
from hf_compress.formats.compressed_tensors_read import load_compressed_tensors
from hf_compress.formats.export import FORMATS, RUNTIMES, export
from hf_compress.formats.gptq import load_gptq
from hf_compress.formats.runtimes.folder import RECORD
from hf_compress.measuring.measure import load_model
from hf_compress.recipe.options import RecipeError

OWN = "hf_compress"
READERS = {"compressed-tensors": load_compressed_tensors, "gptq": load_gptq}  # formats of others


def run(verb: str, arguments: list[str]) -> int:
    given = convert_parser().parse_all(arguments)
    output = Path(given.output)
    source = made_by(given.model, {}, output)
    if given.format not in (OWN, *FORMATS):
        raise RecipeError(f"--format must be one of {', '.join((OWN, *FORMATS))}, got {given.format!r}.")
    check_free(output)
    method = (getattr(AutoConfig.from_pretrained(source), "quantization_config", None) or {}).get("quant_method")
    model = READERS[method](source) if method in READERS else load_model(source, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(source) if has_tokenizer(source) else None
    if given.format != OWN:
        export(model, output, format=given.format, tokenizer=tokenizer)
    else:
        with whole_folder(output) as beside:
            model.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
    if given.format in RUNTIMES:
        sys.stdout.write(agreement(output))
    sys.stdout.write(f"{given.format}  {output}\n")
    return 0


def agreement(folder: Path) -> str:
    """What hf_compress.json says of the agreement with the model, one line an output."""
    measured = json.loads((folder / RECORD).read_text(encoding="utf-8"))["agreement"]
    if "equal_weights" in measured:
        return f"{measured['equal_weights']} tensors decode to the weights of the model\n"
    lines = []
    for name, values in measured["outputs"].items():
        figures = "  ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in values.items())
        lines.append(f"{name}  {measured['texts']} texts  {figures}\n")
    return "".join(lines)


def convert_parser() -> Parser:
    parser = Parser("hf-compress convert", description="Write a model in another format. GPTQ and "
                    "compressed-tensors checkpoints of others can be read as well.")  # fmt: skip
    parser.add_argument("model", help="A folder, what `hf-compress run` wrote, or a Hub name.")
    parser.add_argument("output", help="An empty or new folder.")
    parser.add_argument("--format", default=OWN, help=f"{', '.join((OWN, *FORMATS))}. Default: {OWN}.")
    return parser


def has_tokenizer(source: str) -> bool:
    folder = Path(source)
    return not folder.is_dir() or (folder / "tokenizer_config.json").is_file()
