"""Models that are measured take turns, wherever each of them runs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from hf_compress.measuring.decoding import DECODED
from hf_compress.measuring.measurement import Measurement
from hf_compress.measuring.timing import Spread, time_interleaved
from hf_compress.model.inputs import THROUGHPUT_BATCH

LATENCY_BATCH = 1
DECODING = "decoding"  # writes some tokens, where a model does
KINDS = {"single": LATENCY_BATCH, "batch": THROUGHPUT_BATCH}  # of a forward: examples in it


class Subject(Protocol):
    """A model that can be measured."""

    def cost(self) -> Measurement:
        """What it costs; speeds are of one forward."""

    def seconds(self, kind: str) -> float:
        """Of one forward at work, `single` or `batch`, or of writing some tokens, `decoding`."""


def measure_in_turns(subjects: Sequence[Subject], *, latency_rounds: int, throughput_rounds: int) -> list[Measurement]:
    """Measure all of them, timed in turns (A B C, A C B, ...) so that their ratios hold on a busy machine.

    Raises ValueError where they are not on one device.
    """
    costs = [subject.cost() for subject in subjects]
    if len(devices := sorted({cost.device for cost in costs})) > 1:
        raise ValueError(f"models that are compared must be on one device, got {devices}. Move them, or give `device`.")
    latencies = in_turns(subjects, "single", latency_rounds)
    seconds = in_turns(subjects, "batch", throughput_rounds)
    writers = [i for i, cost in enumerate(costs) if cost.decoding is not None]
    written = in_turns([subjects[i] for i in writers], DECODING, throughput_rounds) if writers else []
    speeds = {i: Spread.of([DECODED / t for t in times]) for i, times in zip(writers, written, strict=True)}
    return [
        replace(cost, latency_ms=Spread.of([1e3 * t for t in single]),
                throughput=Spread.of([THROUGHPUT_BATCH / t for t in batch]), decoding=speeds.get(i))
        for i, (cost, single, batch) in enumerate(zip(costs, latencies, seconds, strict=True))
    ]  # fmt: skip


def in_turns(subjects: Sequence[Subject], kind: str, rounds: int) -> list[list[float]]:
    """Seconds as the subjects themselves took them: the way to another process and back does not count."""
    spent = 0.0

    def call(subject: Subject) -> Callable[[], None]:
        def run() -> None:
            nonlocal spent
            spent += subject.seconds(kind)

        return run

    return time_interleaved([call(subject) for subject in subjects], rounds=rounds, clock=lambda: spent)
