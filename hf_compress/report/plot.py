"""The trade-off in one picture: quality against size, and against speed-up."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from hf_compress.report.result import Results
from hf_compress.report.score import is_share
from hf_compress.report.tables import conditions_short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.container import ErrorbarContainer
    from matplotlib.transforms import Bbox


WIDTH_INCHES, HEIGHT_INCHES, DPI = 10.0, 4.6, 160  # 1600 x 736 pixels: sharp at 800 wide on a dense screen
# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = "osD^vPX"
LABEL_DISTANCES_POINTS = (9, 16, 26, 40, 58, 80)
LABEL_ANGLES_DEGREES = (0, 180, 90, 270, 45, 135, 315, 225)
GUIDE = "reference"
INK, FAINT = "#222222", "#BBBBBB"


def trade_off_png(report: Results) -> bytes:
    """A PNG of two panels that share the quality axis. Raises ValueError when no quality was measured."""
    if not report.num_examples:
        raise ValueError("there is no quality to plot: give `compare` an eval_dataset.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the trade-off plot needs matplotlib: pip install "hf_compress[plot]"') from error

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global is touched, and no display is needed
    size, speed = figure.subplots(1, 2, sharey=True)
    scale, unit = (100.0, ", %") if is_share(report.metric) else (1.0, "")
    qualities = [scale * entry.quality for entry in report.entries]
    spreads = [scale * (entry.quality_spread or 0.0) for entry in report.entries]
    megabytes = [entry.measurement.stored_bytes / 1e6 for entry in report.entries]
    speeds = [entry.throughput_speed_up for entry in report.entries]

    size.set(xlabel="size on disk, MB (\N{LEFTWARDS ARROW} smaller)", ylabel=plain(f"{report.metric}{unit}"))
    speed.set(xlabel=plain(f"throughput at batch 32 over that of {report.reference} (faster \N{RIGHTWARDS ARROW})"))
    _points(size, megabytes, qualities, spreads, [(0.0, 0.0)] * len(megabytes))
    _points(
        speed,
        [interval.value for interval in speeds],
        qualities,
        spreads,
        [(interval.value - interval.low, interval.high - interval.value) for interval in speeds],
    )
    reference = report.entries.index(report[report.reference])
    guide = {"color": FAINT, "linewidth": 1.2, "linestyle": "--", "zorder": 0, "gid": GUIDE}
    for axes in (size, speed):
        axes.axhline(qualities[reference], **guide)
    speed.axvline(1.0, **guide)
    size.set_xlim(0, 1.25 * max(megabytes))
    speed.set_xlim(0, 1.25 * max(interval.high for interval in speeds))
    low = min(quality - spread for quality, spread in zip(qualities, spreads, strict=True))
    high = max(quality + spread for quality, spread in zip(qualities, spreads, strict=True))
    margin = max(0.25 * (high - low), 0.005 * abs(high), 1e-6)
    size.set_ylim(low - margin, high + margin)
    figure.supxlabel(plain(conditions_short(report)), fontsize=9, color="#555555")
    canvas.draw()  # places the axes, which the labels are fitted into
    figure.set_layout_engine("none")
    for axes in (size, speed):
        _label_points(axes, [plain(entry.name) for entry in report.entries])
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def plain(text: str) -> str:
    """Text as it is: between two dollars matplotlib would read mathematics, and fail at what is none."""
    return text.replace("$", r"\$")


def _points(
    axes: Axes, xs: list[float], ys: list[float], y_spreads: list[float], x_errors: list[tuple[float, float]]
) -> None:
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        axes.errorbar(
            x,
            y,
            yerr=y_spreads[i] or None,
            xerr=[[max(0.0, x_errors[i][0])], [max(0.0, x_errors[i][1])]] if any(x_errors[i]) else None,
            fmt=MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=8,
            capsize=3,
            elinewidth=1.2,
            zorder=3,
        )
    axes.grid(color="#F0F0F0", zorder=-1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=INK, labelsize=9)


def _extents(axes: Axes, container: ErrorbarContainer, renderer: RendererAgg) -> list[Bbox]:
    """Boxes of a point's marker, bars and caps, in pixels."""
    from matplotlib.transforms import Bbox

    marker, caps, bars = container
    ends = [axes.transData.transform(segment) for bar in bars for segment in bar.get_segments()]  # (2, 2) each
    lines = [Bbox([segment.min(0), segment.max(0)]) for segment in ends]
    return [*(part.get_window_extent(renderer) for part in (marker, *caps)), *lines]


def _label_points(axes: Axes, names: list[str]) -> list[Bbox]:
    """Write each name beside its point, where it covers no point, no error bar and no other name.

    Tries directions, then distances; far ones get a thin line to their point. Returns the boxes of the names.
    """
    from matplotlib.patheffects import withStroke

    renderer = axes.figure.canvas.get_renderer()
    guides = [line.get_window_extent(renderer) for line in axes.lines if line.get_gid() == GUIDE]
    points = [box.padded(3) for container in axes.containers for box in _extents(axes, container, renderer)]
    obstacles = [*guides, *points]
    inside = axes.get_window_extent(renderer)
    pixels_a_point = axes.figure.dpi / 72
    placed: list[Bbox] = []
    for i, (name, container) in enumerate(zip(names, axes.containers, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        point = container.lines[0].get_xydata()[0]
        label = axes.annotate(
            name, point, xytext=(0, 0), textcoords="offset points", fontsize=10, va="center", ha="center", color=colour,
            path_effects=[withStroke(linewidth=3, foreground="white")], zorder=5,
        )  # fmt: skip
        box = label.get_window_extent(renderer)  # pixels
        x, y = axes.transData.transform(point)
        best = None
        for distance in LABEL_DISTANCES_POINTS:
            for angle in LABEL_ANGLES_DEGREES:
                right, up = round(math.cos(math.radians(angle)), 3), round(math.sin(math.radians(angle)), 3)
                dx = right * distance * pixels_a_point + (right > 0) * box.width / 2 - (right < 0) * box.width / 2
                dy = up * distance * pixels_a_point + (up > 0) * box.height / 2 - (up < 0) * box.height / 2
                moved = box.translated(dx, dy)
                nearest = (min(max(x, moved.x0), moved.x1), min(max(y, moved.y0), moved.y1))
                way = [(x + step * (nearest[0] - x) / 10, y + step * (nearest[1] - y) / 10) for step in range(1, 10)]
                crowd = sum(other.overlaps(moved) for other in [*obstacles, *placed])
                crowd += sum(other.contains(*spot) for other in placed for spot in way)
                crowd += not (inside.x0 <= moved.x0 and moved.x1 <= inside.x1)
                crowd += not (inside.y0 <= moved.y0 and moved.y1 <= inside.y1)
                if best is None or crowd < best[0]:
                    best = (crowd, distance, (dx, dy), nearest, moved)
            if best[0] == 0:
                break
        _, distance, offset, nearest, moved = best
        label.set_position((offset[0] / pixels_a_point, offset[1] / pixels_a_point))
        if distance > LABEL_DISTANCES_POINTS[1]:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", point, xytext=nearest, textcoords="figure pixels", arrowprops=line)
        placed.append(moved)
    return placed
