"""The figures of a report as text: columns for a terminal, tables for Markdown."""

import csv
import io
import shutil
import sys

from hf_compress.report.result import Entry, Interval, Results
from hf_compress.report.score import is_share


def terminal_table(report: Results) -> str:
    lines = fitted(main_rows(report))
    further = [f"{one.name}: {', '.join(f'{name} {value:.4f}' for name, value in one.scores.items())}."
               for one in report.entries if one.scores]  # fmt: skip
    return "\n".join([*lines, "", *further, *verdicts(report), *report.notes, conditions(report)])


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of columns for a terminal, the header and a rule first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def fitted(rows: list[list[str]]) -> list[str]:
    """`aligned`, with a column for each model where that alone is as narrow as the terminal."""
    lines = aligned(rows)
    if not sys.stdout.isatty():
        return lines
    turned = aligned([list(cells) for cells in zip(*rows, strict=True)])
    columns = shutil.get_terminal_size().columns
    return turned if len(turned[1]) <= columns < len(lines[1]) else lines


def markdown(report: Results) -> str:
    parts = [_markdown_table(rows) for rows in all_tables(report)]
    lines = [*verdicts(report), *report.notes]
    parts += ["\n".join(f"- {line}" for line in lines)] * bool(lines)
    parts += [conditions(report), f"Command: `{report.command}`"]
    return "\n\n".join(parts) + "\n"


CSV_COLUMNS = (
    "model", "quality", "quality_spread", "parameters", "stored_bytes", "bits_per_weight", "multiply_adds",
    "peak_memory_bytes", "latency_ms", "latency_ms_10", "latency_ms_90", "examples_per_second",
    "examples_per_second_10", "examples_per_second_90", "parameter_rate", "byte_rate", "multiply_add_rate",
    "score_over_size", "latency_speed_up", "latency_speed_up_low", "latency_speed_up_high", "throughput_speed_up",
    "throughput_speed_up_low", "throughput_speed_up_high", "quality_difference", "quality_difference_low",
    "quality_difference_high", "p_value", "zero_weights", "unknown_tokens", "num_tokens", "reference", "metric",
    "dataset", "num_examples", "device", "runtime", "threads", "dtype", "decode_tokens_per_second", "command",
)  # fmt: skip


def csv_text(report: Results) -> str:
    """One line a model under a line of names; what was not measured is empty."""
    text = io.StringIO()
    lines = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    lines.writeheader()
    for entry in report.entries:
        lines.writerow(_csv_row(report, entry))
    return text.getvalue()


def _csv_row(report: Results, entry: Entry) -> dict[str, object]:
    cost, difference = entry.measurement, entry.difference
    row = {
        "model": entry.name, "quality": entry.quality, "quality_spread": entry.quality_spread,
        "latency_ms": cost.latency_ms.median, "latency_ms_10": cost.latency_ms.low,
        "latency_ms_90": cost.latency_ms.high, "examples_per_second": cost.throughput.median,
        "examples_per_second_10": cost.throughput.low, "examples_per_second_90": cost.throughput.high,
        "parameter_rate": entry.parameter_rate, "byte_rate": entry.byte_rate,
        "multiply_add_rate": report.multiply_add_rate(entry), "score_over_size": report.score_over_size(entry),
        "zero_weights": cost.sparsity.get("weights"), "unknown_tokens": entry.unknown_tokens,
        "num_tokens": entry.num_tokens, "reference": report.reference, "metric": report.metric,
        "dataset": report.dataset, "num_examples": report.num_examples, "command": report.command,
        "p_value": None if difference is None else difference.p_value,
        "decode_tokens_per_second": None if cost.decoding is None else cost.decoding.median,
    }  # fmt: skip
    same = ("parameters", "stored_bytes", "bits_per_weight", "multiply_adds", "peak_memory_bytes", "device",
            "runtime", "threads", "dtype")  # fmt: skip
    row |= {name: getattr(cost, name) for name in same}
    intervals = {"latency_speed_up": entry.latency_speed_up, "throughput_speed_up": entry.throughput_speed_up,
                 "quality_difference": None if difference is None else difference.interval}  # fmt: skip
    for name, interval in intervals.items():
        if interval is not None:
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: object) -> object:
    """A text that a spreadsheet would compute, such as =1+1, is marked as a text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def verdicts(report: Results) -> list[str]:
    """Sentences on each model: do its quality and speed differ from the reference's, and by how much."""
    lines = []
    for entry in report.entries:
        difference = entry.difference
        if difference is None:
            continue
        interval = difference.interval
        scale, unit = scale_of(report)
        finding = {
            "no difference": f"no difference from {report.reference} found",
            "better": f"better than {report.reference}",
            "worse": f"worse than {report.reference}",
        }[difference.verdict]
        lines.append(
            f"{entry.name}: {finding}: {scale * interval.value:+.2f}{unit} {report.metric}, 95% interval "
            f"{scale * interval.low:+.2f} to {scale * interval.high:+.2f}, p {_p_value(difference.p_value)} "
            f"({difference.test}, {report.num_examples} examples)."
        )
    return lines + [_speed_sentence(report, entry) for entry in report.entries if entry.name != report.reference]


def _speed_sentence(report: Results, entry: Entry) -> str:
    figures = []
    for what, speed_up in (("latency", entry.latency_speed_up), ("throughput", entry.throughput_speed_up)):
        words = {"no difference": "no difference found", "better": "faster", "worse": "slower"}[speed_up.speed_verdict]
        figures.append(f"{what} {speed_up.value:.2f}x, {speed_up.low:.2f} to {speed_up.high:.2f} ({words})")
    return f"{entry.name}: speed-up over {report.reference}, 95% intervals: {'; '.join(figures)}."


def conditions(report: Results) -> str:
    """Where and how the figures were measured."""
    one = report.entries[0].measurement
    length = "real examples" if one.sequence_length is None else f"{one.sequence_length} tokens"
    versions = ", ".join(f"{name} {number}" for name, number in one.versions.items())
    data = f"{report.num_examples} examples of {report.dataset or 'the given data'}; " if report.num_examples else ""
    threads = f"{one.threads} thread{'s' * (one.threads != 1)}"
    return (
        f"Measured on {one.device}, {threads}, {dtypes(report)}, {length} an example, models in turns; "
        f"{data}medians over rounds, rates against {report.reference}; {versions}."
    )


def conditions_short(report: Results) -> str:
    """One line for a picture."""
    one = report.entries[0].measurement
    length = "" if one.sequence_length is None else f", {one.sequence_length} tokens"
    return f"{one.device}, {one.threads} thread{'s' * (one.threads != 1)}, {dtypes(report)}{length}"


def dtypes(report: Results) -> str:
    """The dtype that all models ran in; where they differ, each with its models."""
    models: dict[str, list[str]] = {}
    for entry in report.entries:
        models.setdefault(entry.measurement.dtype, []).append(entry.name)
    if len(models) == 1:
        return next(iter(models))
    return "; ".join(f"{dtype}: {', '.join(names)}" for dtype, names in models.items())


def scale_of(report: Results) -> tuple[float, str]:
    """What a difference of the metric is multiplied by to be read, and the unit it has then."""
    return (100.0, " points of") if is_share(report.metric) else (1.0, "")


def quality_text(report: Results, entry: Entry) -> str:
    if entry.quality is None:
        return "-"
    scale, unit, digits = (100.0, "%", 1) if is_share(report.metric) else (1.0, "", 4)
    spread = "" if entry.quality_spread is None else f" ± {scale * entry.quality_spread:.{digits}f}"
    return f"{scale * entry.quality:.{digits}f}{spread}{unit}"


def all_tables(report: Results) -> list[list[list[str]]]:
    """Quality and size, costs, and where there are such, further scores and tasks of lm-eval; headers first."""
    others = [rows for rows in (score_rows(report), task_rows(report)) if len(rows[0]) > 1]
    return [main_rows(report), cost_rows(report), *others]


def main_rows(report: Results) -> list[list[str]]:
    """The main table, its header first."""
    return [_main_header(report), *(_main_row(report, entry) for entry in report.entries)]


def cost_rows(report: Results) -> list[list[str]]:
    """The table of costs, its header first."""
    rows = [_cost_header(), *(_cost_row(report, entry) for entry in report.entries)]
    speeds = [entry.measurement.decoding for entry in report.entries]
    if not any(speeds):
        return rows
    written = ["decoding, batch 1", *("-" if one is None else f"{number_text(one.median)} tokens/s" for one in speeds)]
    return [[*row, text] for row, text in zip(rows, written, strict=True)]


def score_rows(report: Results) -> list[list[str]]:
    """Further figures of the metric, its header first; without a column where there are none."""
    names = list(dict.fromkeys(name for entry in report.entries for name in entry.scores))
    lines = [[f"{entry.scores[n]:.4f}" if n in entry.scores else "-" for n in names] for entry in report.entries]
    return [["model", *names], *([entry.name, *cells] for entry, cells in zip(report.entries, lines, strict=True))]


def task_rows(report: Results) -> list[list[str]]:
    """Scores on tasks of lm-eval, its header first; a standard error stands behind its score."""
    scores = {name: {(task, metric): value for task, metrics in found.items() for metric, value in metrics.items()}
              for name, found in report.tasks.items()}  # fmt: skip
    columns = list(dict.fromkeys(c for found in scores.values() for c in found if not c[1].endswith("_stderr")))
    rows = [["model", *(f"{task}, {metric}" for task, metric in columns)]]
    for name, found in scores.items():
        errors = {column: found.get((column[0], f"{column[1]}_stderr")) for column in columns}
        cells = [
            f"{found[c]:.4f}" + (f" ± {errors[c]:.4f}" if errors[c] else "") if c in found else "-" for c in columns
        ]
        rows.append([name, *cells])
    return rows


def _main_header(report: Results) -> list[str]:
    runtime = ["runtime"] * report.has_runtimes
    return ["model", *runtime, report.metric, "parameters", "on disk", "latency, batch 1", "throughput, batch 32"]


def _main_row(report: Results, entry: Entry) -> list[str]:
    cost = entry.measurement
    return [
        entry.name,
        *[cost.runtime] * report.has_runtimes,
        quality_text(report, entry),
        f"{count_text(cost.parameters)} ({entry.parameter_rate:.2f}x)",
        f"{size_text(cost.stored_bytes)} ({entry.byte_rate:.2f}x)",
        f"{cost.latency_ms.median:.2f} ms ({_rate_text(entry.latency_speed_up)})",
        f"{number_text(cost.throughput.median)}/s ({_rate_text(entry.throughput_speed_up)})",
    ]


def _cost_header() -> list[str]:
    return [
        "model",
        "bits per weight",
        "multiply-adds",
        "peak memory",
        "latency, 10-90%",
        "throughput, 10-90%",
        "zeros",
    ]


def _cost_row(report: Results, entry: Entry) -> list[str]:
    cost = entry.measurement
    return [
        entry.name,
        f"{cost.bits_per_weight:.2f}",
        f"{count_text(cost.multiply_adds)} ({report.multiply_add_rate(entry):.2f}x)",
        "-" if cost.peak_memory_bytes is None else size_text(cost.peak_memory_bytes),
        f"{cost.latency_ms.low:.2f}-{cost.latency_ms.high:.2f} ms",
        f"{number_text(cost.throughput.low)}-{number_text(cost.throughput.high)}/s",
        ", ".join(f"{kind.replace('_', ' ')} {share:.1%}" for kind, share in cost.sparsity.items() if share)
        or ("none" if cost.sparsity else "-"),
    ]


def _markdown_table(rows: list[list[str]]) -> str:
    escaped = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _rate_text(speed_up: Interval) -> str:
    return f"{speed_up.value:.2f}x"


def rate_word(rate: float, above: str, below: str) -> str:
    """14.71 as "14.7x smaller", 0.5 as "2.0x larger", 1.004 as "1.00x smaller"."""
    larger, word = (rate, above) if rate >= 1 else (1 / rate, below)
    digits = 0 if larger >= 99.95 else 1 if larger >= 1.05 else 2
    return f"{larger:.{digits}f}x {word}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def number_text(value: float) -> str:
    """12.34 as "12.3", 1234.5 as "1,234"."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def count_text(count: float) -> str:
    """12_345_678 as "12.3 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def size_text(size_bytes: float) -> str:
    """Decimal units: 90_868_988 as "90.9 MB"."""
    return f"{count_text(size_bytes)}B" if size_bytes >= 1000 else f"{size_bytes} B"
