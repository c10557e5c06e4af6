"""Time and memory of calls, measured so that ratios hold on a busy machine.

Calls that are compared take turns in a shuffled order (A B C, A C B, B A C, ...): what slows the machine down for a
while slows all of them down, and none always runs after the same other one, or ever after itself.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_compress.training.progress import progress_bar

WARMUP_ROUNDS = 3
WARM = 0.06  # seconds of calls before a turn
ENOUGH = 0.02  # seconds of calls in a turn
MOST = 100  # calls in a turn, and before it


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one figure: their median, and the range from the 10th to the 90th percentile."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        if not samples:
            raise ValueError("a spread needs at least one sample, got none.")
        ordered = sorted(samples)
        return cls(statistics.median(ordered), _quantile(ordered, 0.1), _quantile(ordered, 0.9), tuple(samples))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted samples, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def time_interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup_rounds: int = WARMUP_ROUNDS,
    steady: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds that each call took in each round, `seconds[call][round]`; every round runs all calls, in an order
    of its own: in one fixed order, a model beside itself came out 8% slower on a busy machine.

    `warmup_rounds` rounds run before and are not kept. With `steady` a turn is some calls in a row. A call must not
    return before its work is done. `clock` gives seconds.
    """
    if rounds < 1 or warmup_rounds < 0:
        raise ValueError(f"rounds must be at least 1 and warmup_rounds 0, got {rounds} and {warmup_rounds}.")
    seconds: list[list[float]] = [[] for _ in calls]
    turns = progress_bar(_orders(len(calls), warmup_rounds + rounds), desc="Timing", total=warmup_rounds + rounds)
    for turn, order in enumerate(turns):
        for i in order:
            elapsed = steady_seconds(calls[i], clock=clock) if steady else _seconds(calls[i], 1, clock)
            if turn >= warmup_rounds:
                seconds[i].append(elapsed)
    return seconds


def steady_seconds(call: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of `call` as in a server at work: the mean of as many in a row as take `ENOUGH`, at least one.

    Calls that take `WARM` before them do not count, at least one: they bring back threads that slept and caches that
    others filled. 30 MB of weights took eight calls to be as fast as they get after a model of 260 MB had run.
    """
    spent = 0.0
    for _ in range(MOST):
        once = _seconds(call, 1, clock)
        spent += once
        if spent >= WARM:
            break
    return _seconds(call, min(max(1, int(ENOUGH / once)), MOST) if once > 0 else 1, clock)


def _seconds(call: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


def _orders(count: int, rounds: int) -> Iterator[list[int]]:
    """Shuffled, the same in every run; the first of a round is not the last of the one before: its caches are warm."""
    chance = random.Random(0)
    order = list(range(count))
    for _ in range(rounds):
        last = order[-1]
        chance.shuffle(order)
        while count > 1 and order[0] == last:
            chance.shuffle(order)
        yield order


def synchronize(device: torch.device) -> None:
    """Wait until the accelerator is done; nothing to wait for on CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_allocated_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `call` held at one time, beyond what was there before it.

    What torch's allocator gave out, temporary tensors inside operators included; memory that libraries such as ONNX
    Runtime take for themselves is not seen.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        call()
        synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler's library writes to stderr
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        call()
    records = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()  # negative when freed
        peak = max(peak, held)
    return peak
