"""`hfc.shrink`: a plan, a training, and what was reached; once more where the wish was missed."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_compress.files.output import Output
from hf_compress.formats.export import RUNTIMES, export, installed
from hf_compress.measuring.measure import load_model
from hf_compress.recipe.data import CLASSIFICATION, DataOptions, RecipeData
from hf_compress.recipe.evaluate import EvaluateOptions, evaluate
from hf_compress.recipe.fingerprints import model_fingerprint
from hf_compress.recipe.options import RecipeError, build
from hf_compress.recipe.recipe import REPORT_FILES, Recipe
from hf_compress.report.report import Report
from hf_compress.shrinking.plan import TEACHER, Texts, first_target, least_time, next_target, stages
from hf_compress.shrinking.times import MeasuredTimes, measured_times
from hf_compress.shrinking.wish import Wish

logger = logging.getLogger(__name__)

PASSES = 2
RUNTIMES_OF_SHRINK = ("torch", "openvino", "onnx")
TOKENS = 32  # of the text that speed is measured on
MEASURING = {"latency_rounds": 60, "throughput_rounds": 12}
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
    plan: bool = False,
    seed: int = 0,
    tokens: int = TOKENS,
    changes: dict[str, Any] | None = None,
    command: str | None = None,
) -> Shrunk:
    """Make a classifier as fast, or as small, as is asked for: the most accurate one that runs so.

    model          a folder or Hub name; one without a head for the data's labels is fine-tuned first
    data           texts and labels, as recipes take them; rows without a label are learned from, too
    output         a folder for everything: `model` (or `exported`), the report, the stages, `shrink.json`
    speedup        times as fast for one text of `tokens` as the model in PyTorch, as it is stored, on this CPU; or
    latency_ms     milliseconds of such a text; or
    size_mb        megabytes on disk; or
    accuracy_loss  points that may be lost at most; the smaller of two sizes that keeps the others
    runtime        where it will run: torch, openvino, onnx
    plan           True only says what would be done
    changes        options of all trainings of the recipe, such as {"num_train_epochs": 1}

    What layers, heads and neurons cost is measured in the runtime first (kept for this machine), and what goes is
    chosen by importance over that cost. A wish that was missed is aimed at once more, from what was measured. Raises
    RecipeError, before anything runs, for a wish that cannot be had, and ImportError for a missing runtime.
    """
    asked = {"speedup": speedup, "latency_ms": latency_ms, "size_mb": size_mb, "accuracy_loss": accuracy_loss}
    wish = Wish.of(**asked)
    if runtime not in RUNTIMES_OF_SHRINK:
        raise RecipeError(f"runtime must be one of {', '.join(RUNTIMES_OF_SHRINK)}, got {runtime!r}.")
    if runtime in RUNTIMES:
        installed(runtime)
    source = {"source": str(data)} if isinstance(data, str | Path) else dict(data)
    texts = RecipeData(build(DataOptions, source, "data"), CLASSIFICATION, needs_labels=True)
    model_fingerprint(model)  # says what is no model
    fine_tunes = not texts.fits(AutoConfig.from_pretrained(model))
    times = _times(model, texts, runtime, tokens) if wish.is_of_time else None
    target = first_target(wish, times)
    told = _told(wish, target, times, runtime, texts, fine_tunes)
    if plan:
        return Shrunk(wish, None, False, None, None, told)
    logger.warning("%s", told)
    with Output(output) as place:
        place.check([*REPORT_FILES, "shrink.json"])
        for number in range(1, PASSES + 1):
            written = stages(wish, target, _counts(texts), times, fine_tunes=fine_tunes)
            recipe = Recipe(_changed(written, changes), model=model, data=source, task=CLASSIFICATION, seed=seed,
                            name="shrink")  # fmt: skip
            made = recipe.run(Path(output) / "run", command=command)
            served = _served(made.model, runtime, Path(output) / f"exported-{made.stages[-1]['fingerprint']}")
            original = _stage(made, TEACHER) if fine_tunes else model
            report = _compared(original, served, texts, tokens, command or "hfc.shrink")
            reached = _figure(wish, report)
            logger.warning("asked: %s; reached: %s", wish.text(wish.value), wish.text(reached))
            again = None if wish.is_met(reached) else next_target(wish, target, reached)
            if again is None or number == PASSES or (times is not None and again < least_time(times.structure)):
                break  # it is there, or as near as it comes
            target = again
        result = {"asked": {wish.kind: wish.value}, "reached": reached, "is_met": wish.is_met(reached),
                  "runtime": runtime, "machine": times.machine if times else None, "passes": number,
                  "model": str(Path(served).relative_to(output))}  # fmt: skip
        place.write({**report.files(), "shrink.json": json.dumps(result, indent=1)})
    return Shrunk(wish, reached, wish.is_met(reached), Path(served), report, told)


def _times(model: str | Path, texts: RecipeData, runtime: str, tokens: int) -> MeasuredTimes:
    return measured_times(load_model(model, device="cpu"), texts.tokenizer(model), runtime, tokens=tokens)


def _counts(texts: RecipeData) -> Texts:
    labels = texts.texts["train"]["label"]
    unlabelled = sum(label is None for label in labels)
    return Texts(len(labels) - unlabelled, unlabelled)


def _told(
    wish: Wish, target: float, times: MeasuredTimes | None, runtime: str, texts: RecipeData, fine_tunes: bool
) -> str:
    counts = _counts(texts)
    lines = [f"wanted    {wish.text(wish.value)}, in {runtime}"]
    if times is not None:
        parts, here = times.structure, runtime if runtime != "torch" else "8 bit"
        lines.append(f"measured  {times.original:.2f} ms in PyTorch; {here}: {parts.fixed:.2f} and {parts.layer:.2f} a "
                     f"layer, heads {parts.heads:.2f}, neurons {parts.neurons:.2f}; {times.machine}")  # fmt: skip
        lines.append(f"aim       {target:.2f} ms for a text of what is chosen")
    lines.append(f"texts     {counts.labelled:,} with a label, {counts.unlabelled:,} without")
    names = [*(["fine-tune"] if fine_tunes else []), "cut vocabulary", "cut structure", "distil", "8 bit",
             *([f"export to {runtime}"] if runtime in RUNTIMES else []), "compare"]  # fmt: skip
    return "\n".join([*lines, f"stages    {', '.join(names)}"])


def _changed(written: list[dict], changes: dict[str, Any] | None) -> list[dict]:
    """The stages, with `changes` in those that train."""
    trains = ("fine-tune", "distil")
    return [{kind: {**o, **(changes or {})} if kind in trains else o for kind, o in stage.items()} for stage in written]


def _stage(made: Any, name: str) -> Path:
    record = next(record for record in made.stages if record["name"] == name)
    return made.output / "stages" / record["folder"] / "model"


def _served(model: str | Path, runtime: str, folder: Path) -> Path:
    if runtime not in RUNTIMES:
        return Path(model)
    record = folder / "hf_compress.json"
    if record.is_file():
        return folder  # of an earlier run of the same
    return export(load_model(model, device="cpu"), folder, format=runtime)


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
