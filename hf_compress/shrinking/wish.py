"""What was asked for: one figure, and whether a model has it."""

import math
from dataclasses import dataclass

from hf_compress.recipe.options import RecipeError

TOLERANCE = 0.1  # of a speed or size: what a busy machine and whole layers cost
KINDS = {  # option -> what it asks for
    "speedup": "times as fast for one text as the model in PyTorch, as it is stored",
    "latency_ms": "milliseconds for one text",
    "size_mb": "megabytes on disk, of all that is needed to run",
    "accuracy_loss": "points of accuracy that may be lost",
}


@dataclass(frozen=True)
class Wish:
    kind: str
    value: float

    @staticmethod
    def of(**asked: float | None) -> "Wish":
        """The one figure that was given. Raises RecipeError for none, for several, and for what cannot be."""
        given = {kind: value for kind, value in asked.items() if value is not None}
        if len(given) != 1:
            said = ", ".join(f"{kind}={value:g}" for kind, value in given.items()) or "nothing"
            raise RecipeError(
                f"Say one thing that is wanted, {', '.join(KINDS)}: got {said}. What is not asked for comes as good as "
                "it can be had."
            )
        ((kind, value),) = given.items()
        least = 1.0 if kind == "speedup" else 0.0
        if not least < value < math.inf:
            raise RecipeError(f"{kind} is {KINDS[kind]}, above {least:g}: got {value:g}.")
        return Wish(kind, float(value))

    @property
    def is_of_time(self) -> bool:
        return self.kind in ("speedup", "latency_ms")

    def milliseconds(self, original: float) -> float:
        """Of a text, for a wish of time and a model that takes so many."""
        return original / self.value if self.kind == "speedup" else self.value

    def is_met(self, reached: float) -> bool:
        """Whether a model with this figure is what was asked for, within the tolerance."""
        if self.kind == "speedup":
            return reached >= self.value * (1 - TOLERANCE)
        if self.kind == "accuracy_loss":
            return reached <= self.value
        return reached <= self.value * (1 + TOLERANCE)

    def is_near(self, reached: float) -> bool:
        """Whether nothing is to be gained by aiming again: as much as was asked for, and little more."""
        if self.kind == "accuracy_loss":
            return self.is_met(reached)
        return abs(reached - self.value) <= TOLERANCE * self.value

    def distance(self, reached: float) -> tuple[bool, float]:
        """Sorts models by how well they have it: those that do come first, the nearest of them."""
        return not self.is_met(reached), reached if self.kind == "accuracy_loss" else abs(reached - self.value)

    def text(self, value: float) -> str:
        """A figure of this kind, as people say it."""
        return {
            "speedup": f"{value:.1f}x as fast", "latency_ms": f"{value:.2f} ms for a text",
            "size_mb": f"{value:.1f} MB", "accuracy_loss": f"{value:+.1f} points lost",
        }[self.kind]  # fmt: skip
