"""`hfc.shrink`: a plan, a training, and what was reached; once more where the wish was missed."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from hf_compress.checkpoint.opening import model_folder
from hf_compress.files.output import Output
from hf_compress.formats.export import export, installed
from hf_compress.measuring.measure import load_model
from hf_compress.model.reading import num_positions_of
from hf_compress.recipe.data import DataOptions, RecipeData
from hf_compress.recipe.evaluate import EvaluateOptions, evaluate
from hf_compress.recipe.fingerprints import model_fingerprint
from hf_compress.recipe.options import RecipeError, build, unknown
from hf_compress.recipe.recipe import REPORT_FILES, Recipe
from hf_compress.recipe.stage import load_for
from hf_compress.recipe.tasks.classification import Classification
from hf_compress.recipe.tasks.embedding import Embeddings
from hf_compress.recipe.tasks.language import CausalLM
from hf_compress.recipe.tasks.table import TASKS, task_of
from hf_compress.report.report import Report
from hf_compress.shrinking.plan import (
    LANGUAGE,
    TEACHER,
    WRITES,
    Texts,
    costs,
    cuts_vocabulary,
    first_target,
    least_time,
    may_have_ranges,
    may_race,
    next_target,
    planned_steps,
    stages,
    with_changes,
)
from hf_compress.shrinking.race import BY_WORTH, depths, nearest_depth, trial, trial_steps, winner
from hf_compress.shrinking.sizes import is_whole, layer_sizes, min_count_for
from hf_compress.shrinking.times import MeasuredTimes, measured_times
from hf_compress.shrinking.told import plan_text
from hf_compress.shrinking.wish import Wish

logger = logging.getLogger(__name__)

PASSES = 2
EXPORTS = {"torch": None, "openvino": "openvino", "onnx": "onnx", "llama.cpp": "gguf"}  # runtime -> format
RUNTIMES_OF_SHRINK = tuple(EXPORTS)
GGUF_BLOCKS = 1.08  # bytes of an 8-bit row or a 4-bit table in blocks of 32 with a scale each, over those of a row
TOKENS = 32  # of the text that speed is measured on
MEASURING = {"latency_rounds": 60, "throughput_rounds": 12}
CHECKED = 64  # texts that an export is run on beside the model
ORIGINAL, SMALL = "original", "small"


@dataclass(frozen=True)
class Shrunk:
    """model: the folder to serve. reached: the figure that was asked for, as measured; None of a plan."""

    wish: Wish
    reached: float | None
    is_met: bool
    model: Path | None
    report: Report | None
    plan: str


class Tried(NamedTuple):
    """A model that was made for a target, and the figure that it reached."""

    target: float
    recipe: Recipe
    model: Path
    served: Path
    report: Report
    reached: float


def shrink(
    model: str | Path,
    data: str | Path | dict[str, Any],
    *,
    output: str | Path,
    speedup: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    accuracy_loss: float | None = None,
    runtime: str = "torch",
    task: str | None = None,
    plan: bool = False,
    seed: int = 0,
    tokens: int = TOKENS,
    changes: dict[str, Any] | None = None,
    command: str | None = None,
) -> Shrunk:
    """Make a model as fast, or as small, as is asked for: the most accurate one that runs so.

    model          a folder or Hub name; one without a head for the data's labels is fine-tuned first
    data           texts and labels, as recipes take them; rows without a label are learned from, too
    output         a folder for everything: `model` (or `exported`), the report, the stages, `shrink.json`
    speedup        times as fast for one text of `tokens` as the model in PyTorch, as it is stored, on this CPU; or
    latency_ms     milliseconds of such a text; or
    size_mb        megabytes on disk; or
    accuracy_loss  points of the task's metric that may be lost; the smaller of two sizes that keeps the others
    runtime        where it will run: torch, openvino, onnx; or llama.cpp, for the size of a GGUF file
    task           one of `recipe.tasks.table.TASKS`; told by the model's class or the data's columns when not given
    plan           True only says what would be done
    changes        options of all trainings of the recipe, such as {"num_train_epochs": 1}

    What layers, heads and neurons cost is measured in the runtime first (kept for this machine), and what goes is
    chosen by importance over that cost. A wish that was missed, or a size or speed that is better than it by more than
    a tenth and could be a better model, is aimed at once more, from what was measured; the nearer of both that has it
    stays. Raises RecipeError, before anything runs, for a wish that cannot be had, and ImportError for a missing
    runtime.
    """
    asked = {"speedup": speedup, "latency_ms": latency_ms, "size_mb": size_mb, "accuracy_loss": accuracy_loss}
    wish = Wish.of(**asked)
    if runtime not in RUNTIMES_OF_SHRINK:
        raise RecipeError(f"runtime must be one of {', '.join(RUNTIMES_OF_SHRINK)}, got {runtime!r}.")
    if EXPORTS[runtime] is not None:
        installed(EXPORTS[runtime])
    source = {"source": str(data)} if isinstance(data, str | Path) else dict(data)
    options = build(DataOptions, source, "data")
    model = model_folder(model)
    model_fingerprint(model)  # says what is no model
    if task is not None and task not in TASKS:
        raise unknown(task, TASKS, "The task")
    task = task or task_of(model, options)
    check_wish(wish, task)
    texts = RecipeData(options, task, needs_labels=True)
    if runtime == "llama.cpp":
        check_llama_cpp(wish, texts, model)
    check_tokens(tokens, model)
    if not plan and Path(output).exists():
        with Output(output) as place:
            place.check([*REPORT_FILES, "shrink.json"])  # before anything is measured
    fine_tunes = texts.kind.is_trained_on_labels and not texts.fits(AutoConfig.from_pretrained(model))
    method = {"method": Embeddings.name} if task == Embeddings.name else {}
    trainings = [{"fine-tune": {}}] * fine_tunes + [{"distil": method}]
    Recipe(with_changes(trainings, changes), seed=seed)  # says which changes cannot be
    times = _times(texts, model, runtime, tokens, wish) if wish.is_of_time else None
    target = first_target(wish, times) / (GGUF_BLOCKS if runtime == "llama.cpp" else 1.0)
    is_of_size = wish.kind == "size_mb"
    min_count = min_count_for(wish, texts, model) if is_of_size and task not in (Embeddings.name, *LANGUAGE) else 1
    parts = layer_sizes(texts, model, min_count if is_of_size and cuts_vocabulary(wish, task) else 0)
    written = partial(stages, wish, texts=_counts(texts), times=times, task=task, fine_tunes=fine_tunes, parts=parts,
                      min_count=min_count)  # fmt: skip
    steps = trial_steps(planned_steps(_counts(texts), changes or {}))
    race = depths(costs(wish, times, parts), target, parts.number) if steps and may_race(wish, task, parts) else []
    told = plan_text(wish, target, times, runtime, texts.task, _counts(texts), written(target=target), race, steps)
    if plan:
        return Shrunk(wish, None, False, None, None, told)
    logger.warning("%s", told)
    checked = list(islice(texts.training_texts(), CHECKED)) if task == Classification.name else None

    def recipe_of(stages: list[dict]) -> Recipe:
        return Recipe(stages, model=model, data=source, task=task, seed=seed, name="shrink")

    def raced(layers: int | None) -> Recipe:
        return recipe_of(trial(with_changes(written(target=target, layers=layers), changes), steps))

    def tried(target: float) -> Tried:
        layers = nearest_depth(best_depth, costs(wish, times, parts), target, parts.number)
        recipe = recipe_of(with_changes(written(target=target, layers=layers), changes))
        made = recipe.run(Path(output) / "run", command=command)
        exported = Path(output) / f"exported-{made.stages[-1]['fingerprint']}"
        served = Path(_served(made.model, runtime, exported, checked))
        shown = Path(made.model) if runtime == "llama.cpp" else served  # whose weights a GGUF file has, bit for bit
        report = _compared(
            _stage(made, TEACHER) if fine_tunes else model, shown, texts, tokens, command or "hfc.shrink"
        )
        reached = _figure(wish, report) if shown == served else gguf_file(served).stat().st_size / 1e6
        logger.warning("asked: %s; reached: %s", wish.text(wish.value), wish.text(reached))
        return Tried(target, recipe, Path(made.model), served, report, reached)

    with Output(output) as place:
        place.check([*REPORT_FILES, "shrink.json"])
        best_depth = winner(race, raced, Path(output) / "run") if race else BY_WORTH
        passes = [tried(target)]
        while len(passes) < PASSES and (again := _again(wish, passes[-1], written, times)) is not None:
            if wish.is_met(passes[-1].reached) and is_whole(passes[-1].model, texts, model):
                break  # faster or smaller than asked for with all that it had
            passes.append(tried(again))
        best = min(passes, key=lambda one: wish.distance(one.reached))
        if best is not passes[-1]:
            best.recipe.run(Path(output) / "run", command=command)  # nothing trains: its model is the run's again
        is_met = wish.is_met(best.reached)
        result = {"asked": {wish.kind: wish.value}, "reached": best.reached, "is_met": is_met,
                  "runtime": runtime, "machine": times.machine if times else None, "passes": len(passes),
                  "model": str(best.served.relative_to(output))}  # fmt: skip
        place.write({**best.report.files(), "shrink.json": json.dumps(result, indent=1)})
    return Shrunk(wish, best.reached, is_met, best.served, best.report, told)


def _times(texts: RecipeData, model: str | Path, runtime: str, tokens: int, wish: Wish) -> MeasuredTimes:
    whole, tokenizer = load_for(texts, model, fresh_head=True), texts.tokenizer(model)
    return measured_times(whole, tokenizer, runtime, tokens=tokens, ranges=may_have_ranges(texts.task), wish=wish)


def check_tokens(tokens: int, model: str | Path) -> None:
    """Raise RecipeError for a text that the model does not read."""
    longest = num_positions_of(AutoConfig.from_pretrained(model)) or tokens
    if not 1 <= tokens <= longest:
        raise RecipeError(f"tokens must lie between 1 and {longest}, which is what {model} reads, got {tokens}.")


def check_wish(wish: Wish, task: str) -> None:
    """Raise RecipeError for a wish that has no meaning in a task."""
    if task in LANGUAGE and wish.kind == "accuracy_loss":
        raise RecipeError(f"accuracy_loss is of tasks with points to lose; {task} has perplexity: ask for size_mb.")
    if task in WRITES and wish.is_of_time:
        raise RecipeError(
            f"{wish.kind} is of one pass over a text, but models of {task} write token by token: ask for size_mb."
        )


def check_llama_cpp(wish: Wish, texts: RecipeData, model: str | Path) -> None:
    """Raise RecipeError for what llama.cpp does not run, and for a figure that is not taken in it."""
    if texts.task not in (CausalLM.name, Embeddings.name):
        raise RecipeError(f"llama.cpp runs models of {CausalLM.name} and {Embeddings.name} here, not of {texts.task}.")
    if wish.kind != "size_mb":
        raise RecipeError(f"llama.cpp is not timed here: ask for size_mb, of the GGUF file, not for {wish.kind}.")
    try:
        installed("gguf").described(load_for(texts, model), texts.tokenizer(model))
    except ValueError as error:
        raise RecipeError(f"{model} does not go to llama.cpp: {error}") from error


def gguf_file(folder: Path) -> Path:
    return folder / installed("gguf").FILE


def _counts(texts: RecipeData) -> Texts:
    rows = texts.texts["train"]
    unlabelled = sum(label is None for label in rows["label"]) if texts.task == Classification.name else 0
    return Texts(len(rows) - unlabelled, unlabelled)


def _again(wish: Wish, one: Tried, written: Callable, times: MeasuredTimes | None) -> float | None:
    """What to aim at next; None where a model is as near as it comes, or what comes next is the same or cannot be."""
    if wish.is_near(one.reached):
        return None
    again = next_target(wish, one.target, one.reached)
    if again is None or (times is not None and again < least_time(times.structure)):
        return None
    try:
        return again if written(target=again) != written(target=one.target) else None
    except RecipeError:
        return None


def _stage(made: Any, name: str) -> Path:
    record = next(record for record in made.stages if record["name"] == name)
    return made.output / "stages" / record["folder"] / "model"


def _served(model: str | Path, runtime: str, folder: Path, texts: list[str] | None) -> Path:
    if EXPORTS[runtime] is None:
        return Path(model)
    record = folder / "hf_compress.json"
    if record.is_file():
        return folder  # of an earlier run of the same
    texts = None if EXPORTS[runtime] == "gguf" else texts
    return export(load_model(model, device="cpu"), folder, format=EXPORTS[runtime], calibration=texts)


def _compared(original: str | Path, served: Path, texts: RecipeData, tokens: int, command: str) -> Report:
    options = EvaluateOptions(sequence_length=tokens, **MEASURING)
    return evaluate(options, {ORIGINAL: original, SMALL: served}, texts, command)


def _figure(wish: Wish, report: Report) -> float:
    entry = next(entry for entry in report.entries if entry.name == SMALL)
    return {
        "speedup": lambda: entry.latency_speed_up.value,
        "latency_ms": lambda: entry.measurement.latency_ms.median,
        "size_mb": lambda: entry.measurement.stored_bytes / 1e6,
        "accuracy_loss": lambda: -100 * entry.difference.interval.value,
    }[wish.kind]()
