"""What a comparison found, in one line: what was gained and what was lost."""

from hf_compress.report.result import Entry, Results
from hf_compress.report.tables import rate_word, scale_of


def headline(report: Results, entry: Entry | None = None) -> str:
    """Of `entry`, by default the last model: size, speed, quality with its 95% interval, on how many examples."""
    entry = entry or report.entries[-1]
    if entry.name == report.reference:
        return f"{entry.name}: what the others are held against"
    where = f" in {entry.measurement.runtime.partition(' ')[0]}" if report.has_runtimes else ""
    parts = [
        rate_word(entry.byte_rate, "smaller", "larger"),
        f"{rate_word(entry.latency_speed_up.value, 'faster', 'slower')}{where} for one text",
        f"{rate_word(entry.throughput_speed_up.value, 'faster', 'slower')} for 32",
    ]
    if entry.difference is not None:
        interval, (scale, unit) = entry.difference.interval, scale_of(report)
        digits = 1 if scale > 1 else 3
        value, low, high = (f"{scale * one:+.{digits}f}" for one in (interval.value, interval.low, interval.high))
        parts.append(f"{value}{unit} {report.metric} ({low} to {high})")
        parts.append(f"{report.num_examples:,} examples")
    return ", ".join(parts)
