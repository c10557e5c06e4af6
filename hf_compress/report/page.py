"""A report as one page of HTML that needs no other file and no network, and fits a phone."""

import base64
from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup

from hf_compress.report.headline import headline
from hf_compress.report.layers import Full, layers_svg
from hf_compress.report.result import Entry, Results
from hf_compress.report.scatter import scatter_svg
from hf_compress.report.tables import all_tables, conditions, verdicts


def html_page(report: Results, plot: bytes | None) -> str:
    """`plot` is a PNG, or None for a page without it."""
    template = (files("hf_compress.report") / "page.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=", ".join(entry.name for entry in report.entries),
        headlines=[(entry.name, headline(report, entry)) for entry in reversed(report.entries)
                   if entry.name != report.reference],
        reference=report.reference,
        tables=all_tables(report),
        sentences=[*verdicts(report), *report.notes],
        conditions=conditions(report),
        command=report.command,
        scatter=Markup(scatter_svg(report)) if report.num_examples else None,
        plot=None if plot is None else base64.b64encode(plot).decode(),
        pictures=structures(report),
    )  # fmt: skip


def structures(report: Results) -> list[tuple[str, Markup]]:
    """Names and picture of models whose layers are known, within the outline of the largest; alike ones share one."""
    drawn = [entry for entry in report.entries if entry.layers]
    if not drawn:
        return []
    tokens = {entry.name: (entry.structure or {}).get("tokens") for entry in drawn}
    full = Full.of([entry.layers for entry in drawn], [number for number in tokens.values() if number])
    alike: dict[tuple, list[Entry]] = {}
    for entry in drawn:
        alike.setdefault((entry.layers, tokens[entry.name], _bits(entry)), []).append(entry)
    pictures = []
    for group in alike.values():
        names, entry = ", ".join(one.name for one in group), group[0]
        facts = {"tokens": tokens[entry.name], "embedding_bits": _bits(entry)}
        pictures.append((names, Markup(layers_svg(entry.layers, title=f"Layers of {names}", full=full, **facts))))
    return pictures


def _bits(entry: Entry) -> float | None:
    return (entry.structure or {}).get("embedding_bits")
