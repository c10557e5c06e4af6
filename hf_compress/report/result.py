"""What a comparison found: plain records. They know no renderer; `report.Report` prints, saves and draws them."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from typing_extensions import Self

from hf_compress.measuring.measurement import PYTORCH, Measurement
from hf_compress.report.layers import LayerFacts
from hf_compress.report.score import is_share, score_over_size, task_scores

SIGNIFICANCE_LEVEL = 0.05
SPEED_MARGIN = 0.02  # where tensors happen to lie in memory makes a model faster or slower than itself by about so much
NOTABLE_SPARSITY = 0.01  # zeros in less than this share of the weights are not worth a word


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def speed_verdict(self) -> str:
        """Of a ratio: "better" or "worse" when all of the interval is beyond the margin around 1."""
        if self.low > 1 + SPEED_MARGIN:
            return "better"
        return "worse" if self.high < 1 / (1 + SPEED_MARGIN) else "no difference"


@dataclass(frozen=True)
class Difference:
    """Quality of a model less that of the reference, mean over the same examples; the interval is over examples."""

    interval: Interval
    p_value: float
    test: str  # "McNemar, exact" or "paired permutation"

    @property
    def verdict(self) -> str:
        if self.p_value >= SIGNIFICANCE_LEVEL:
            return "no difference"
        return "better" if self.interval.value > 0 else "worse"


@dataclass(frozen=True)
class Entry:
    """One model beside the reference. A rate above 1 is an advantage: smaller, faster."""

    name: str
    architecture: str  # class in Transformers
    needs_plugin: bool  # loads only after `import hf_compress`
    structure: dict[str, int | list[int]] | None  # None where the anatomy is not known
    seed_qualities: tuple[float, ...]  # one for each seed; empty when nothing was evaluated
    difference: Difference | None  # None for the reference itself
    measurement: Measurement  # of the first seed
    parameter_rate: float  # parameters of the reference over this model's
    byte_rate: float
    latency_speed_up: Interval
    throughput_speed_up: Interval
    layers: tuple[LayerFacts, ...] = ()  # empty where the anatomy is not known
    unknown_tokens: int | None = None  # of the evaluated texts, that its tokenizer does not know; None: not counted
    num_tokens: int | None = None  # of these texts, without special ones
    scores: dict[str, float] = field(default_factory=dict)  # further figures of the metric, such as each label's F1

    @property
    def quality(self) -> float | None:
        return statistics.fmean(self.seed_qualities) if self.seed_qualities else None

    @property
    def quality_spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.seed_qualities) if len(self.seed_qualities) > 1 else None


@dataclass(frozen=True)
class Results:
    """Several models, compared on the same examples and in turns on the same machine."""

    reference: str
    entries: tuple[Entry, ...]
    metric: str
    dataset: str | None
    num_examples: int
    command: str
    tasks: dict[str, dict[str, dict[str, float]]] = field(
        default_factory=dict
    )  # model -> lm-eval task -> metric -> value
    data_notes: tuple[str, ...] = ()  # what was read for it, and what was left out

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no model {name!r} in this report, only {[entry.name for entry in self.entries]}.")

    def multiply_add_rate(self, entry: Entry) -> float:
        """The theoretical speed-up: multiply-adds of the reference over the model's, both as stored.

        Blalock et al., 2020, https://arxiv.org/abs/2003.03033. A zero that is stored costs nothing there; here it is
        multiplied like any other, as dense products do.
        """
        return self[self.reference].measurement.multiply_adds / max(entry.measurement.multiply_adds, 1)

    def score_over_size(self, entry: Entry) -> float | None:
        """Points over millions of parameters: of the tasks of lm-eval where there are any, else of the quality where it
        is a share; None without either. See `score.score_over_size`."""
        scores = task_scores(self.tasks.get(entry.name, {}))
        if not scores and entry.quality is not None and is_share(self.metric):
            scores = [100 * entry.quality]
        return score_over_size(scores, entry.measurement.parameters) if scores else None

    @property
    def has_runtimes(self) -> bool:
        """Whether anything ran elsewhere than in PyTorch."""
        return any(entry.measurement.runtime != PYTORCH for entry in self.entries)

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the figures."""
        notes = []
        for entry in self.entries:
            share = entry.measurement.sparsity.get("weights", 0.0)
            if share >= NOTABLE_SPARSITY:
                notes.append(
                    f"{entry.name}: {share:.1%} of the weights in linear maps are zeros that are stored like others: "
                    "the model is masked, and not smaller for it."
                )
            if len(entry.seed_qualities) > 1:
                notes.append(
                    f"{entry.name}: quality is the mean of {len(entry.seed_qualities)} seeds, ± their standard "
                    "deviation; size and speed are of the first."
                )
        if self.has_runtimes:
            notes.append("What runs elsewhere than in PyTorch was timed in a process of its own, on as many threads.")
        for entry in self.entries:
            if ran := entry.measurement.routes:
                told = ", ".join(f"{number} by {name}" for name, number in sorted(ran.items()))
                mode = entry.measurement.cpu_mode
                asked = "" if mode == "auto" else f" (HF_COMPRESS_CPU={mode})"
                notes.append(f"{entry.name}: packed layers ran {told}{asked}.")
        counts = {entry.name: (entry.unknown_tokens, entry.num_tokens) for entry in self.entries if entry.num_tokens}
        if any(unknown or counts.get(self.reference) != (unknown, tokens) for unknown, tokens in counts.values()):
            told = [
                f"{name} {unknown:,} of {number:,} ({unknown / number:.2%})"
                for name, (unknown, number) in counts.items()
            ]
            notes.append(f"Tokens of these texts that a model does not know: {'; '.join(told)}.")
        return notes + [f"Data: {'; '.join(self.data_notes)}."] * bool(self.data_notes)

    def to_json(self) -> str:
        """Every figure, every timing, and what was derived from them."""
        record = asdict(self)
        for entry, plain in zip(self.entries, record["entries"], strict=True):
            plain["quality"], plain["quality_spread"] = entry.quality, entry.quality_spread
            if entry.difference:
                plain["difference"]["verdict"] = entry.difference.verdict
        return json.dumps({"version": 1, **record, "notes": self.notes}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote, as it was. Raises ValueError for anything else."""
        try:
            record = json.loads(text)
            entries = tuple(_entry(plain) for plain in record["entries"])
            own = _own_fields(cls, record, without=("entries", "data_notes"))
            return cls(entries=entries, data_notes=tuple(record.get("data_notes", ())), **own)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no report of hf_compress: {error}.") from error


def _own_fields(kind: type, record: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [field.name for field in fields(kind) if field.name not in without]
    return {name: record.get(name, {}) if name == "tasks" else record[name] for name in names}


def _entry(plain: Mapping[str, Any]) -> Entry:
    interval = lambda one: Interval(**one)  # noqa: E731
    difference = plain["difference"]
    if difference is not None:
        difference = Difference(interval(difference["interval"]), difference["p_value"], difference["test"])
    built = {
        "seed_qualities": tuple(plain["seed_qualities"]),
        "difference": difference,
        "measurement": Measurement.from_plain(plain["measurement"]),
        "latency_speed_up": interval(plain["latency_speed_up"]),
        "throughput_speed_up": interval(plain["throughput_speed_up"]),
        "layers": tuple(LayerFacts(**layer) for layer in plain.get("layers", ())),
        "unknown_tokens": plain.get("unknown_tokens"),
        "num_tokens": plain.get("num_tokens"),
        "scores": plain.get("scores", {}),
    }
    return Entry(**built, **_own_fields(Entry, plain, without=tuple(built)))
