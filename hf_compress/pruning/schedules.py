"""When masks are updated, and how much they hold back at each update. Steps count finished optimizer steps."""

from dataclasses import dataclass

SCHEDULES = ("cubic", "one-shot", "two-slopes", "fixed")
THRESHOLDS = ("two-slopes", "fixed")  # those that hold back what is small, however much that is


@dataclass(frozen=True)
class OneShot:
    """All at once, after step `begin`."""

    sparsity: float
    begin: int

    @property
    def end(self) -> int:
        return self.begin

    def updates_at(self, step: int) -> bool:
        return step == self.begin

    def level(self, step: int) -> float:
        """The sparsity to reach with the update at `step`."""
        return self.sparsity if step >= self.begin else 0.0


@dataclass(frozen=True)
class Cubic:
    """Fast at first, then ever slower: s_i = s_f + (s_0 - s_f) (1 - (i - i_0) / (n f))^3, here with s_0 = 0.

    Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, eq. 1. `begin` is i_0, `frequency` is f, `num_updates` is n.
    """

    sparsity: float
    begin: int
    frequency: int
    num_updates: int

    @property
    def end(self) -> int:
        return self.begin + self.num_updates * self.frequency

    def updates_at(self, step: int) -> bool:
        return self.begin <= step <= self.end and (step - self.begin) % self.frequency == 0

    def level(self, step: int) -> float:
        """The sparsity to reach with the update at `step`."""
        progress = min(max(step - self.begin, 0) / (self.num_updates * self.frequency), 1.0)
        return self.sparsity - self.sparsity * (1 - progress) ** 3


class _Threshold:
    """Updated every `frequency` steps from `begin` on, and at `end`."""

    def updates_at(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.frequency == 0 or step == self.end)


@dataclass(frozen=True)
class TwoSlopes(_Threshold):
    """A threshold on magnitudes that rises linearly from `begin`, and 1.5 times as fast from `ramp` to `end`.

    Narang et al. 2017, https://arxiv.org/abs/1704.05119 (weights) and https://arxiv.org/abs/1711.02782 (blocks, whose
    slopes are `num_elements ** (1 / 4)` times as steep). The threshold is `level(step) * q`, with q the magnitude
    that a share `sparsity` of a matrix's weights stays under when pruning begins.
    """

    sparsity: float
    begin: int
    ramp: int
    end: int
    frequency: int
    num_elements: int = 1

    def level(self, step: int) -> float:
        """The threshold at `step`, in units of q."""
        if step < self.begin:
            return 0.0
        s, r, e, f, i = self.begin, self.ramp, self.end, self.frequency, min(step, self.end)
        theta = 2 * f / (2 * (r - s) + 3 * (e - r)) * self.num_elements**0.25
        phi = 1.5 * theta
        if i <= r:
            return theta * (i - s + 1) / f
        return (theta * (r - s + 1) + phi * (i - r + 1)) / f


@dataclass(frozen=True)
class Fixed(_Threshold):
    """A threshold on magnitudes that stays: at each update goes what has fallen below it since, retrained in between.

    Han et al. 2015, https://arxiv.org/abs/1506.02626, section 3, where it is a multiple of a matrix's standard
    deviation; here it is q of `TwoSlopes`, so that a share `sparsity` goes at the first update.
    """

    begin: int
    end: int
    frequency: int
    num_elements: int = 1

    def level(self, step: int) -> float:
        """The threshold at `step`, in units of q."""
        return self.num_elements**0.25 if step >= self.begin else 0.0


Schedule = OneShot | Cubic | TwoSlopes | Fixed


def check_schedule(kind: str, sparsity: float, begin: float, end: float, num_updates: int) -> None:
    """Raise ValueError for settings from which no schedule can be made, whatever the number of steps."""
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share that goes: it must be at least 0 and below 1, got {sparsity}.")
    if not 0 <= begin <= 1 or not 0 <= end <= 1:
        raise ValueError(f"begin and end are shares of the training, between 0 and 1, got {begin} and {end}.")
    if kind != "one-shot" and end <= begin:
        raise ValueError(
            f"The schedule ends before it starts: begin={begin}, end={end}. Choose end > begin, or schedule='one-shot'."
        )
    if num_updates < 1:
        raise ValueError(f"num_updates must be at least 1, got {num_updates}.")


def make_schedule(
    kind: str,
    sparsity: float,
    *,
    begin: float,
    end: float,
    num_updates: int,
    max_steps: int,
    first_step: int = 0,
    num_elements: int = 1,
) -> Schedule:
    """The schedule for a training of `max_steps`, of which `begin` and `end` are shares.

    The first update is not before `first_step`. Raises ValueError for a training too short for it.
    """
    check_schedule(kind, sparsity, begin, end, num_updates)
    first, last = max(round(begin * max_steps), first_step), min(round(end * max_steps), max_steps)
    if kind == "one-shot":
        if first > max_steps:
            raise ValueError(f"Pruning would begin after step {first}, but training has only {max_steps} steps.")
        return OneShot(sparsity, first)
    if last <= first:
        raise ValueError(
            f"The schedule ends before it starts: after step {last} of {max_steps}, while the first update is after "
            f"step {first}. Train longer, or choose an earlier begin or a later end."
        )
    num_updates = min(num_updates, last - first)
    frequency = (last - first) // num_updates
    if kind == "cubic":
        return Cubic(sparsity, last - num_updates * frequency, frequency, num_updates)
    if kind == "fixed":
        return Fixed(first, last, frequency, num_elements)
    return TwoSlopes(sparsity, first, (first + last) // 2, last, frequency, num_elements)
