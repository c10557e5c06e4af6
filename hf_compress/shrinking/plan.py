"""The stages that make a model as fast or as small as was asked for."""

from dataclasses import dataclass
from typing import Any

from hf_compress.pruning.targets import StructureTimes
from hf_compress.recipe.options import RecipeError
from hf_compress.shrinking.times import ROWS, MeasuredTimes
from hf_compress.shrinking.wish import Wish

TEACHER, STUDENT, SERVED = "teacher", "student", "packed"
FEW_LABELS = 2.0  # unlabelled texts for each labelled one, from which on the teacher's answers are all that is learned
MANY_TEXTS, FEW_EPOCHS, EPOCHS = 20_000, 2, 6
BUDGETS = 0.5, 0.25  # shares of the parameters that go where a loss is asked for: at first, and if it was too much
SMALL_TABLES = 4  # bits of the tables where size is what counts
TRAINING = {"per_device_train_batch_size": 32, "warmup_steps": 0.1, "train_sampling_strategy": "group_by_length",
            "save_steps": 0.5}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """What there is to learn from."""

    labelled: int
    unlabelled: int


def stages(wish: Wish, target: float, texts: Texts, times: MeasuredTimes | None, *, fine_tunes: bool) -> list[dict]:
    """The stages of a recipe whose model has `target`, a figure of the wish's kind (a share that goes, of a loss)."""
    every = texts.labelled + texts.unlabelled
    learns_labels = texts.unlabelled < FEW_LABELS * texts.labelled
    found: list[dict] = []
    if fine_tunes:
        found.append({"fine-tune": {"name": TEACHER, "num_train_epochs": 3, "learning_rate": 1e-4, **TRAINING}})
    found.append({"prune": {"method": "vocabulary"}})
    found.append({"prune": structure(wish, target, times)})
    found.append({"distil": {
        "name": STUDENT, "teacher": "vocabulary", "cache_teacher": True, "alpha": 0.7 if learns_labels else 1.0,
        "temperature": 2.0, "learning_rate": 3e-4,
        "num_train_epochs": FEW_EPOCHS if every > MANY_TEXTS else EPOCHS, **TRAINING,
    }})  # fmt: skip
    tables = SMALL_TABLES if wish.kind == "size_mb" else ROWS["embedding_bits"]
    found.append({"quantize": {"name": SERVED, "bits": 8, "heads_too": True, **ROWS, "embedding_bits": tables}})
    return found


def structure(wish: Wish, target: float, times: MeasuredTimes | None) -> dict[str, Any]:
    """The options of the stage that cuts."""
    if wish.is_of_time:
        parts = {name: round(value, 6) for name, value in vars(times.structure).items()}
        return {"method": "time", "name": "structure", "milliseconds": round(target, 6), **parts}
    if wish.kind == "size_mb":
        return {"method": "size", "name": "structure", "megabytes": round(target, 6), "embedding_bits": SMALL_TABLES}
    return {"method": "budget", "name": "structure", "sparsity": target}


def first_target(wish: Wish, times: MeasuredTimes | None) -> float:
    """Raises RecipeError for a time that not even a model of nearly nothing has."""
    if wish.kind == "accuracy_loss":
        return BUDGETS[0]
    if not wish.is_of_time:
        return wish.value
    target = times.original / wish.value if wish.kind == "speedup" else wish.value
    least = least_time(times.structure)
    if target < least:
        best = times.original / least if wish.kind == "speedup" else least
        raise RecipeError(
            f"{wish.text(wish.value)} cannot be had here: of {times.original:.2f} ms for a text in PyTorch, "
            f"{least:.2f} would be left in one layer of nearly nothing. The most is {wish.text(best)}."
        )
    return target


def least_time(parts: StructureTimes) -> float:
    """Of one layer with an eighth of its heads and neurons: below, nothing is left that could learn."""
    return parts.of(1, heads=1 / 8, neurons=1 / 8)


def next_target(wish: Wish, target: float, reached: float) -> float | None:
    """What to aim at after a model that `reached` another figure; None where nothing is left to try."""
    if wish.kind == "speedup":
        return target * reached / wish.value
    if wish.kind == "accuracy_loss":
        return BUDGETS[1] if reached > wish.value else None
    return target * wish.value / reached
