"""The stages that make a model as fast or as small as was asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_compress.pruning.targets import StructureTimes
from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.tasks.classification import Classification
from hf_compress.recipe.tasks.embedding import Embeddings
from hf_compress.recipe.tasks.language import CausalLM, MaskedLM, Seq2Seq
from hf_compress.shrinking.times import ROWS, THINNEST, MeasuredTimes
from hf_compress.shrinking.wish import Wish

TEACHER, STUDENT, ROUNDED_STUDENT, SERVED = "teacher", "student", "ranges", "packed"
FEW_LABELS = 2.0  # unlabelled texts for each labelled one, from which on the teacher's answers are all that is learned
MANY_TEXTS, FEW_EPOCHS, EPOCHS = 20_000, 2, 6
BUDGETS = 0.5, 0.25  # shares of the parameters that go where a loss is asked for: at first, and if it was too much
SMALL_TABLES = 4  # bits of the tables where size is what counts
TABLE_SHARE = 0.5  # of a size that is asked for, at most the table of tokens: rarer tokens go
COUNTS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32  # how often a token that stays must occur
LANGUAGE = MaskedLM.name, CausalLM.name, Seq2Seq.name
WRITES = CausalLM.name, Seq2Seq.name
LEARNING_RATE = 3e-4
RANGES_RATE = 0.1  # of the student's
RANGES = 1 / 6  # of the epochs once more, in 8 bit: the ranges of inputs, and what their rounding costs
ROUNDED = 0.1  # of a layer: what a wish may be missed by
TRAINING = {"per_device_train_batch_size": 32, "warmup_steps": 0.1, "train_sampling_strategy": "group_by_length",
            "save_steps": 0.5}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """What there is to learn from."""

    labelled: int
    unlabelled: int


@dataclass(frozen=True)
class LayerSizes:
    """Megabytes of each of `number` layers, and of all else, in the bits that they will have."""

    number: int
    layer: float
    rest: float
    stacks: int = 1  # 2 of an encoder with a decoder


def stages(
    wish: Wish, target: float, texts: Texts, times: MeasuredTimes | None, *, task: str = Classification.name,
    fine_tunes: bool = False, parts: LayerSizes | None = None, min_count: int = 1, layers: int | None = None,
) -> list[dict]:  # fmt: skip
    """The stages of a recipe whose model has `target`, a figure of the wish's kind (a share that goes, of a loss).

    parts      of an embedder, whose layers go whole: its vectors have no loss that heads and neurons matter to
    min_count  how often a token must occur in the texts to stay
    layers     so many stay, cut evenly; None leaves it to their worth over cost
    """
    found: list[dict] = []
    if fine_tunes:
        found.append({"fine-tune": {"name": TEACHER, "num_train_epochs": 3, "learning_rate": 1e-4, **TRAINING}})
    if cuts_vocabulary(wish, task):
        found.append({"prune": {"method": "vocabulary", "min_count": min_count}})
    if task == Embeddings.name:
        learning = {"method": Embeddings.name, "num_hidden_layers": whole_layers(wish, target, times, parts)}
    else:
        found.append({"prune": structure(wish, target, times, layers)})
        learned = "vocabulary" if cuts_vocabulary(wish, task) else TEACHER if fine_tunes else "input"
        learning = {"teacher": learned, **learned_from_teacher(task, texts)}
    learning.update({"learning_rate": LEARNING_RATE, "num_train_epochs": epochs(texts), **TRAINING})
    found.append({"distil": {"name": STUDENT, **learning}})
    tables = SMALL_TABLES if wish.kind == "size_mb" else ROWS["embedding_bits"]
    rounding = {"name": SERVED, "bits": 8, "heads_too": True, **ROWS, "embedding_bits": tables}
    if times is None or not times.has_ranges:
        return [*found, {"quantize": rounding}]
    last = {"name": ROUNDED_STUDENT, **_of_ranges(learning)}
    found.append({"together": [{"distil": last}, {"quantize": {"method": "qat", **rounding}}]})
    return found


def with_changes(written: list[dict], changes: dict[str, Any] | None) -> list[dict]:
    """The stages, with `changes` in those that train; what trains ranges has its share of steps and rate."""

    def changed(kind: str, options: Any, new: dict[str, Any]) -> Any:
        if kind == "together":
            return [{k: changed(k, o, _of_ranges(new)) for k, o in part.items()} for part in options]
        return {**options, **new} if kind in ("fine-tune", "distil") else options

    return [{kind: changed(kind, options, changes or {}) for kind, options in stage.items()} for stage in written]


def _of_ranges(changes: dict[str, Any]) -> dict[str, Any]:
    shares: dict[str, Callable[[Any], Any]] = {
        "num_train_epochs": lambda value: value * RANGES,
        "max_steps": lambda value: math.ceil(value * RANGES) if value > 0 else value,
        "learning_rate": lambda value: value * RANGES_RATE,
        "cache_teacher": lambda value: False,  # one pass over the texts at most
    }
    return {name: shares[name](value) if name in shares else value for name, value in changes.items()}


def epochs(texts: Texts) -> int:
    return FEW_EPOCHS if texts.labelled + texts.unlabelled > MANY_TEXTS else EPOCHS


def may_have_ranges(task: str) -> bool:
    """Whether one range may be trained for the inputs of each layer: answers bear that, vectors and words less."""
    return task not in (Embeddings.name, *LANGUAGE)


def may_race(wish: Wish, task: str, parts: LayerSizes) -> bool:
    """Whether several structures have what is asked for: of one stack, a time or a size, and no embedder's layers."""
    return wish.kind != "accuracy_loss" and task != Embeddings.name and parts.stacks == 1


def planned_steps(texts: Texts, changes: dict[str, Any]) -> int:
    """Of the student's training."""
    options = {"num_train_epochs": epochs(texts), **TRAINING, **changes}
    rows = math.ceil((texts.labelled + texts.unlabelled) / options["per_device_train_batch_size"])
    most = options.get("max_steps", -1)
    return most if most > 0 else math.ceil(rows * options["num_train_epochs"])


def costs(wish: Wish, times: MeasuredTimes | None, parts: LayerSizes) -> StructureTimes:
    """What structures cost in what is asked for, milliseconds or megabytes."""
    return (
        times.structure
        if wish.is_of_time
        else StructureTimes(fixed=parts.rest, heads=0.0, neurons=parts.layer, rest=0.0)
    )


def cuts_vocabulary(wish: Wish, task: str) -> bool:
    """A classifier meets the words of its texts; an embedder those of others, too: its table goes for size alone.

    A language model keeps its own: it is to write, and with other tokens it cannot be held against its teacher.
    """
    return task not in LANGUAGE and (wish.kind == "size_mb" or task != Embeddings.name)


def rarest_kept(wish: Wish, tokens: Callable[[int], int], width: int, others: int) -> int:
    """How often a token must occur to stay, for a model of a size.

    tokens  of a count, those that stay for it
    width   of the table of tokens
    others  parameters that neither tokens nor layers have

    Raises RecipeError where even the tokens that occur most, and those, take it all.
    """
    for count in COUNTS:
        table = (number := tokens(count)) * width * SMALL_TABLES / 8 / 1e6
        if table <= TABLE_SHARE * wish.value:
            break
    least = table + others / 1e6
    if least > wish.value:
        raise RecipeError(
            f"{wish.text(wish.value)} cannot be had here: {number:,} tokens, those that occur {count} times, and what "
            f"is neither table nor layer take {least:.2f} MB."
        )
    return count


def learned_from_teacher(task: str, texts: Texts) -> dict[str, Any]:
    """How a student with a head follows the model before its structure was cut."""
    if task in LANGUAGE:
        return {"alpha": 1.0, "temperature": 1.0}  # a vocabulary's logits for each token are not kept
    learns_labels = texts.unlabelled < FEW_LABELS * texts.labelled
    return {"cache_teacher": True, "alpha": 0.7 if learns_labels else 1.0, "temperature": 2.0}


def whole_layers(wish: Wish, target: float, times: MeasuredTimes | None, parts: LayerSizes) -> int:
    """The most layers that have the target; one at least. Raises RecipeError where one is too much."""
    if wish.is_of_time:
        fixed, layer, unit = times.structure.fixed, times.structure.layer, "ms"
    elif wish.kind == "size_mb":
        fixed, layer, unit = parts.rest, parts.layer, "MB"
    else:
        return max(1, round(parts.number * (1 - target)))
    left = target - fixed
    if left < layer * (1 - ROUNDED):
        raise RecipeError(
            f"{wish.text(wish.value)} cannot be had here: an embedder keeps whole layers, and one takes "
            f"{fixed + layer:.2f} {unit} where {target:.2f} are left."
        )
    return min(parts.number, max(1, int(left / layer + ROUNDED))) if layer else parts.number


def structure(wish: Wish, target: float, times: MeasuredTimes | None, layers: int | None = None) -> dict[str, Any]:
    """The options of the stage that cuts."""
    evenly = {} if layers is None else {"num_layers": layers}
    if wish.is_of_time:
        parts = {name: round(value, 6) for name, value in vars(times.structure).items()}
        return {"method": "time", "name": "structure", "milliseconds": round(target, 6), **parts, **evenly}
    if wish.kind == "size_mb":
        size = {"megabytes": round(target, 6), "embedding_bits": SMALL_TABLES}
        return {"method": "size", "name": "structure", **size, **evenly}
    return {"method": "budget", "name": "structure", "sparsity": target}


def first_target(wish: Wish, times: MeasuredTimes | None) -> float:
    """Raises RecipeError for a time that not even a model of nearly nothing has."""
    if wish.kind == "accuracy_loss":
        return BUDGETS[0]
    if not wish.is_of_time:
        return wish.value
    target = wish.milliseconds(times.original)
    least = least_time(times.structure)
    if target < least:
        best = times.original / least if wish.kind == "speedup" else least
        raise RecipeError(
            f"{wish.text(wish.value)} cannot be had here: of {times.original:.2f} ms for a text in PyTorch, "
            f"{least:.2f} would be left in one layer of nearly nothing. The most is {wish.text(best)}."
        )
    return target


def least_time(parts: StructureTimes) -> float:
    """Of one layer of the thinnest."""
    return parts.of(1, heads=THINNEST, neurons=THINNEST)


def next_target(wish: Wish, target: float, reached: float) -> float | None:
    """What to aim at after a model that `reached` another figure; None where nothing is left to try."""
    if wish.kind == "speedup":
        return target * reached / wish.value
    if wish.kind == "accuracy_loss":
        return BUDGETS[1] if reached > wish.value else None
    return target * wish.value / reached
