"""`hf-compress publish FOLDER --repo-id ...`: a model, its card and its report go to the Hub."""

import json
import logging
import sys
from dataclasses import fields
from pathlib import Path

from hf_compress.commands.compare import made_by
from hf_compress.commands.parser import Parser, add_options
from hf_compress.measuring.identity import model_identity
from hf_compress.publishing.hub import Published, publish
from hf_compress.recipe.options import RecipeError, build
from hf_compress.recipe.publish import PublishOptions, card_stages
from hf_compress.report.report import Report
from hf_compress.report.tables import size_text

logger = logging.getLogger(__name__)


def run(verb: str, arguments: list[str]) -> int:
    given = vars(publish_parser().parse_all(arguments))
    names = {field.name for field in fields(PublishOptions)}
    options = build(PublishOptions, {n: v for n, v in given.items() if n in names}, "hf-compress publish")
    folder = Path(given["folder"])
    if not folder.is_dir():
        raise RecipeError(f"There is no folder {folder}: give what save_pretrained or `hf-compress run` wrote.")
    model = made_by(str(folder), {}, folder)
    found = publish(
        model, options.repo_id, report=given["report"] or report_in(folder, model), stages=card_stages(records(folder)),
        private=not options.public, dry_run=options.dry_run, revision=given["revision"], keep=given["keep"],
        **options.card_options(),
    )  # fmt: skip
    show(found)
    return 0


def publish_parser() -> Parser:
    parser = Parser("hf-compress publish", description="Send a model with its card and report to the Hub, in one "
                    "commit; private unless asked otherwise.")  # fmt: skip
    parser.add_argument("folder", help="What save_pretrained or `hf-compress run` wrote.")
    parser.add_argument("--report", default=None, help="Folder of a report of `hf-compress compare`.")
    parser.add_argument("--revision", default=None, help="Branch to write to. Default: main.")
    parser.add_argument("--keep", default=None, help="A folder that gets a copy of everything that is sent.")
    add_options(parser, PublishOptions, "publishing")
    return parser


def records(folder: Path) -> list[dict]:
    """The records of the stages that made what `hf-compress run` wrote to `folder`, in order; none of other folders."""
    made = folder / "stages.json"
    return json.loads(made.read_text(encoding="utf-8")) if made.is_file() else []


def report_in(folder: Path, model: str) -> Path | None:
    """The report that lies beside a model, if it is of this very model and not of what it was before."""
    file = folder / "report.json"
    if not file.is_file():
        return None
    entries = Report.from_json(file.read_text(encoding="utf-8")).entries
    identity = model_identity(model)  # exports have none, nor has a model without safetensors
    if identity is not None and identity in [entry.measurement.identity for entry in entries]:
        return file
    logger.warning("%s is of another model: size and speed are measured now.", file)
    return None


def show(found: Published) -> None:
    lines = [f"{size_text(size):>10}  {name}" for name, size in found.files.items()]
    end = found.url or f"Dry run: nothing was sent to {found.repo_id}."
    sys.stdout.write(
        "\n".join([*lines, f"{len(found.files)} files, {size_text(sum(found.files.values()))}", end]) + "\n"
    )
