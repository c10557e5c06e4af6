"""The board as a picture and a page: accuracy against size and against latency, a curve for each kind of method."""

import html
import io
from collections.abc import Sequence

from evidence.cells import SUBJECT
from evidence.results import Row
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from hf_compress.report.plot import COLOURS, FAINT, MARKERS
from hf_compress.report.result import Interval

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Board</title>
<style>body{font-family:sans-serif;margin:1em auto;max-width:75em;padding:0 1em}img{max-width:100%}
table{border-collapse:collapse;font-size:.85em}td,th{border-bottom:1px solid #ccc;padding:.25em .5em;text-align:left}
div{overflow-x:auto}</style>
<h1>Board</h1>
"""


def picture(rows: Sequence[Row], intervals: Sequence[Interval]) -> bytes:
    """A PNG of one subject: its rows as numbered points with their 95% intervals, the best of each kind joined.

    `intervals` are of the rows' accuracies less the subject's, which is drawn at 0.
    """
    figure = Figure(figsize=(12, 5.5), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    size, speed = figure.subplots(1, 2, sharey=True)
    kinds = list(dict.fromkeys(row.kind for row in rows if row.kind))
    for axes, x in (
        (size, lambda row: row.mean("stored_bytes") / 1e6),
        (speed, lambda row: row.speed("latency").value),
    ):
        axes.axhline(0, color=FAINT, linestyle="--", linewidth=1)
        axes.set_xscale("log")
        for i, kind in enumerate(["", *kinds]):
            colour, own = COLOURS[(i - 1) % len(COLOURS)] if i else "black", []
            for number, (row, interval) in enumerate(zip(rows, intervals, strict=True)):
                if row.kind != kind:
                    continue
                y, low, high = (100 * one for one in (interval.value, interval.low, interval.high))
                own.append((x(row), y))
                axes.errorbar(x(row), y, yerr=[[max(y - low, 0)], [max(high - y, 0)]], fmt=MARKERS[i % len(MARKERS)],
                              color=colour, capsize=2, markersize=5, linewidth=0.8, alpha=0.8)  # fmt: skip
                axes.annotate(
                    str(number), (x(row), y), xytext=(5, 3), textcoords="offset points", fontsize=8, color=colour
                )
            axes.plot([], [], MARKERS[i % len(MARKERS)], color=colour, label=kind or SUBJECT)
            if kind and (front := frontier(own, smaller=axes is size)):
                axes.step(*zip(*front, strict=True), where="post", color=colour, linewidth=1, alpha=0.6)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(MaxNLocator(6) if high < 3 * low else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="#F0F0F0")
    size.set(xlabel="MB on disk, smaller to the left", ylabel="points of accuracy less the subject's")
    speed.set(xlabel="latency of one text: times as fast as the subject")
    size.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def frontier(points: Sequence[tuple[float, float]], *, smaller: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both, by ascending x; smaller or larger x is better."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0] if smaller else -point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return sorted(best)


def page(sections: Sequence[tuple[str, str, Sequence[Sequence[str]]]]) -> str:
    """HTML of (title, source of a picture or nothing, table) each."""
    parts = [PAGE]
    for title, source, table in sections:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        parts += [f'<img src="{source}" alt="accuracy against size and latency">'] * bool(source)
        rows = [[html.escape(cell) for cell in row] for row in table]
        head, *body = ["<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>"
                       for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)]  # fmt: skip
        parts.append("\n".join(["<div><table>", head, *body, "</table></div>"]))
    return "\n".join([*parts, "</html>", ""])
