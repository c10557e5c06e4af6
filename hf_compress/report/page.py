"""A report as one page of HTML that needs no other file and no network, and fits a phone."""

import base64
from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup

from hf_compress.report.layers import layers_svg
from hf_compress.report.result import Results
from hf_compress.report.tables import all_tables, conditions, verdicts


def html_page(report: Results, plot: bytes | None) -> str:
    """`plot` is a PNG, or None for a page without it."""
    drawn = [entry for entry in report.entries if entry.layers]
    full = {
        "full_heads": max((layer.heads for entry in drawn for layer in entry.layers), default=None),
        "full_neurons": max((layer.neurons for entry in drawn for layer in entry.layers), default=None),
    }
    pictures = [(entry.name, Markup(layers_svg(entry.layers, title=f"Layers of {entry.name}", **full)))
                for entry in drawn]  # fmt: skip
    template = (files("hf_compress.report") / "page.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=", ".join(entry.name for entry in report.entries),
        tables=all_tables(report),
        sentences=[*verdicts(report), *report.notes],
        conditions=conditions(report),
        command=report.command,
        plot=None if plot is None else base64.b64encode(plot).decode(),
        pictures=pictures,
    )  # fmt: skip
