"""What a comparison found, in one line: what was gained and what was lost."""

from hf_compress.report.result import Entry, Results
from hf_compress.report.tables import scale_of


def headline(report: Results, entry: Entry | None = None) -> str:
    """Of `entry`, by default the last model: size, speed, quality with its 95% interval, on how many examples."""
    entry = entry or report.entries[-1]
    if entry.name == report.reference:
        return f"{entry.name}: what the others are held against"
    parts = [
        rate_text(entry.byte_rate, "smaller", "larger"),
        f"{rate_text(entry.latency_speed_up.value, 'faster', 'slower')} for one text",
        f"{rate_text(entry.throughput_speed_up.value, 'faster', 'slower')} for 32",
    ]
    if entry.difference is not None:
        interval, (scale, unit) = entry.difference.interval, scale_of(report)
        digits = 1 if scale > 1 else 3
        value, low, high = (f"{scale * one:+.{digits}f}" for one in (interval.value, interval.low, interval.high))
        parts.append(f"{value}{unit} {report.metric} ({low} to {high})")
        parts.append(f"{report.num_examples:,} examples")
    return ", ".join(parts)


def rate_text(rate: float, above: str, below: str) -> str:
    """14.71 as "14.7x smaller", 0.5 as "2.0x larger", 1.004 as "1.00x smaller"."""
    larger, word = (rate, above) if rate >= 1 else (1 / rate, below)
    digits = 0 if larger >= 99.95 else 1 if larger >= 1.05 else 2
    return f"{larger:.{digits}f}x {word}"
