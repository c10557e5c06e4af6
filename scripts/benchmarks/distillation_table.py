"""The table and the picture of `distillation.py`, from its results."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_compress.report.differences import paired_difference
from hf_compress.report.result import Difference

INK, POINT, BETTER, WORSE, GUIDE = "#222222", "#666666", "#009E73", "#D55E00", "#BBBBBB"
SIGNIFICANT = 0.05


class Cell:
    """One method on one student: all seeds, and the difference to the same student alone."""

    def __init__(self, lines: Sequence[dict], alone: Sequence[dict] | None):
        self.accuracies = [line["accuracy"] for line in lines]
        self.mean, self.spread = mean(self.accuracies), stdev(self.accuracies) if len(lines) > 1 else 0.0
        self.difference: Difference | None = None
        if alone:
            self.difference = paired_difference(answers(alone), answers(lines))

    @property
    def is_significant(self) -> bool:
        return self.difference is not None and self.difference.p_value < SIGNIFICANT

    def __str__(self) -> str:
        text = f"{self.mean:.1%}" + (f" ± {self.spread:.1%}" if len(self.accuracies) > 1 else "")
        if self.difference is None:
            return text
        star = "\\*" if self.is_significant else ""
        return f"{text} ({100 * self.difference.interval.value:+.1f}{star})"


def answers(lines: Sequence[dict]) -> torch.Tensor:
    """(seeds, sentences), 1 where right."""
    return torch.tensor([[int(c) for c in line["correct"]] for line in lines], dtype=torch.double)


def cells(results: Sequence[dict]) -> dict[str, dict[str, Cell]]:
    """Student -> method -> cell, in the order of the runs."""
    grouped: dict[str, dict[str, list[dict]]] = {}
    for line in results:
        student, _, method = line["run"].partition(": ")
        if method:
            grouped.setdefault(student, {}).setdefault(method, []).append(line)
    return {
        student: {m: Cell(lines, None if m == "alone" else methods.get("alone")) for m, lines in methods.items()}
        for student, methods in sorted(grouped.items())
    }


def table(results: Sequence[dict]) -> str:
    """Markdown: a row for each method, a column for each student."""
    found = cells(results)
    teacher = next(line["accuracy"] for line in results if line["run"] == "teacher")
    methods = list(dict.fromkeys(m for column in found.values() for m in column))
    rows = [f"Teacher: {teacher:.1%}.", "", "| method | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for method in methods:
        rows.append(f"| {method} | " + " | ".join(str(column.get(method, "")) for column in found.values()) + " |")
    return "\n".join(rows)


def picture(results: Sequence[dict], file: Path) -> None:
    """A panel for each student: mean over seeds, each seed, and the teacher's accuracy as a line."""
    found = cells(results)
    teacher = next(line["accuracy"] for line in results if line["run"] == "teacher")
    methods = list(dict.fromkeys(m for column in found.values() for m in column))[::-1]
    figure = Figure(figsize=(3.4 * len(found) + 1, 0.34 * len(methods) + 1.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (student, column) in zip(panels, found.items(), strict=True):
        axes.axvline(100 * teacher, color=GUIDE, linestyle="--", linewidth=1.2)
        if "alone" in column:
            axes.axvline(100 * column["alone"].mean, color=GUIDE, linewidth=1.2)
        for y, method in enumerate(methods):
            if method not in column:
                continue
            cell = column[method]
            colour = POINT
            if cell.is_significant:
                colour = BETTER if cell.difference.interval.value > 0 else WORSE
            axes.plot([100 * a for a in cell.accuracies], [y] * len(cell.accuracies), "|", color=colour, markersize=9)
            axes.plot(100 * cell.mean, y, "o", color=colour)
        axes.set_title(f"student {student}", fontsize=10, color=INK)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel("accuracy, % (dashed: teacher, line: alone)", fontsize=8)
        axes.grid(axis="y", color="#EEEEEE")
        axes.set_axisbelow(True)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    file.write_bytes(png.getvalue())
