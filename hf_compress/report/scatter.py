"""Size against quality, as a picture that a phone shows at its own size and that follows dark and light."""

import html
import math

from hf_compress.report.result import Results
from hf_compress.report.score import is_share
from hf_compress.report.tables import quality_text, rate_word, size_text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, LINE = 340, 200, 42, 34, 12, 20  # pixels
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888"  # Okabe and Ito
RADIUS = 8.5
MARGIN = 0.15  # of the range of quality, above and below


def scatter_svg(report: Results) -> str:
    """One numbered point a model, and what the numbers stand for below. Raises ValueError without quality."""
    if not report.num_examples:
        raise ValueError("there is no quality to draw: give `compare` an eval_dataset.")
    scale = 100.0 if is_share(report.metric) else 1.0
    qualities = [scale * entry.quality for entry in report.entries]
    bytes_ = [entry.measurement.stored_bytes for entry in report.entries]
    span = max(max(qualities) - min(qualities), 0.01 * abs(max(qualities)), 1e-6)
    low, high = min(qualities) - MARGIN * span, max(qualities) + MARGIN * span
    right, below = WIDTH - 14, HEIGHT - BOTTOM

    def x(size: float) -> float:
        return LEFT + (right - LEFT) * size / (1.05 * max(bytes_))

    def y(quality: float) -> float:
        return below - (below - TOP) * (quality - low) / (high - low)

    title = html.escape(f"{report.metric} against size on disk")
    tall = HEIGHT + LINE * len(report.entries) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" role="img" aria-label="{title}" '
        'font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>{title}</title>",
        f'<path d="M{LEFT} {TOP}V{below}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">size on disk, smaller is to the left</text>',
        f'<text x="{LEFT + 6}" y="{TOP + 4}">{html.escape(report.metric)}{", %" if scale > 1 else ""}</text>',
    ]
    placed: list[tuple[float, float]] = []
    digits = 1 if scale > 1 else 3
    for quality in (min(qualities), max(qualities)):
        parts.append(f'<text x="{LEFT - 5}" y="{y(quality) + 4:.1f}" text-anchor="end">{quality:.{digits}f}</text>')
    for size in (0, max(bytes_)):
        parts.append(f'<text x="{x(size):.1f}" y="{below + 15}" text-anchor="middle">{size_text(size)}</text>')
    for number, (entry, size, quality) in enumerate(zip(report.entries, bytes_, qualities, strict=True), 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        told = f"{entry.name}: {quality_text(report, entry)}, {size_text(size)}"
        if entry.name != report.reference:
            told += f", {rate_word(entry.byte_rate, 'smaller', 'larger')}"
        line = HEIGHT + LINE * (number - 1) + 14
        place = beside(placed, x(size), y(quality))
        placed.append(place)
        if place[0] != x(size):
            parts.append(f'<path d="M{x(size):.1f} {place[1]:.1f}H{place[0]:.1f}" stroke="{colour}"/>')
        for cx, cy in (place, (12, line - 4)):
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{RADIUS}" fill="{colour}" stroke="#fff"/>')
            parts.append(f'<text x="{cx:.1f}" y="{cy + 4:.1f}" text-anchor="middle" fill="#fff">{number}</text>')
        parts.append(f'<text x="26" y="{line}">{html.escape(told)}</text>')
    return "\n".join([*parts, "</svg>"])


def beside(placed: list[tuple[float, float]], x: float, y: float) -> tuple[float, float]:
    """(x, y), or the nearest place in its row where a point hides none of `placed`; a line leads back."""
    steps = (sign * step * RADIUS for step in range(int(WIDTH / RADIUS)) for sign in (1, -1))
    places = ((x + step, y) for step in steps if step == 0 or LEFT <= x + step <= WIDTH - RADIUS)
    free = (place for place in places if all(math.dist(place, other) >= 2 * RADIUS for other in placed))
    return next(free, (x, y))
