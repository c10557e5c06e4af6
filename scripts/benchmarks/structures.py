"""One speed in a runtime, had as `shrink` does, by importance over measured time, all layers evenly, or in whole ones.

    hf-compress fine-tune --model all-MiniLM-L6-v2 --data movie_reviews --output runs/teacher
    python scripts/benchmarks/structures.py --model runs/teacher/model --data movie_reviews --output runs/structures

Whole layers, evenly spaced as DistilBERT's are, set the times to be had: one for each number in `--layers`. What the
parts cost is measured as `hf-compress shrink` does, and all students go through its stages: the same texts, steps and
teacher, 8 bit, exported. `shrink` lets a few structures learn for a tenth of the steps and takes the best, here with
the first seed. Of those that all layers cannot have, thin as they may be, that is said. A run that was
stopped goes on; the differences are paired, text by text and seed by seed.
"""

import argparse
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_compress.formats.export import export  # noqa: E402
from hf_compress.measuring.measure import load_model, versions  # noqa: E402
from hf_compress.model.anatomy import anatomy  # noqa: E402
from hf_compress.recipe.data import DataOptions, RecipeData  # noqa: E402
from hf_compress.recipe.evaluate import EvaluateOptions, evaluate  # noqa: E402
from hf_compress.recipe.recipe import Recipe  # noqa: E402
from hf_compress.recipe.tasks.classification import Classification  # noqa: E402
from hf_compress.shrinking.plan import Texts, planned_steps, stages, structure, with_changes  # noqa: E402
from hf_compress.shrinking.race import BY_WORTH, depths, trial, trial_steps, winner  # noqa: E402
from hf_compress.shrinking.run import CHECKED  # noqa: E402
from hf_compress.shrinking.times import MeasuredTimes, measured_times  # noqa: E402
from hf_compress.shrinking.wish import Wish  # noqa: E402

WISH = Wish("latency_ms", 1.0)


def cuts(times: MeasuredTimes, depth: int, layers: int, best: int | None) -> dict[str, dict[str, Any]]:
    """The stage that prunes a model of `depth` layers to the time of so many whole ones, in each of the ways."""
    milliseconds = times.structure.of(layers)
    return {
        "as shrink": structure(WISH, milliseconds, times, best),
        "by importance": structure(WISH, milliseconds, times),
        "evenly": structure(WISH, milliseconds, times, depth),
        "whole layers": {"method": "structure", "name": "structure", "layers": 1 - layers / depth},
    }


def recipe(args: argparse.Namespace, cut: dict[str, Any], texts: Texts, times: MeasuredTimes, seed: int,
           steps: int = 0) -> Recipe:  # fmt: skip
    """What `shrink` would do, with this in place of the stage that it cuts with; or its trial of so many steps."""
    written = with_changes(stages(WISH, times.structure.of(1), texts, times), {"num_train_epochs": args.epochs})
    changed = [{"prune": cut} if stage.get("prune", {}).get("method") == "time" else stage for stage in written]
    changed = trial(changed, steps) if steps else changed
    return Recipe(changed, model=args.model, data=str(args.data), seed=seed, name="structures")


def raced(args: argparse.Namespace, depth: int, layers: int, texts: Texts, times: MeasuredTimes) -> int | None:
    """The number of layers that `shrink` would take, or none for those by importance."""
    milliseconds = times.structure.of(layers)
    steps = trial_steps(planned_steps(texts, {"num_train_epochs": args.epochs}))
    tried = depths(times.structure, milliseconds, depth) if steps else []

    def short(number: int | None) -> Recipe:
        return recipe(args, structure(WISH, milliseconds, times, number), texts, times, args.seeds[0], steps)

    return winner(tried, short, args.output / "run") if tried else BY_WORTH


def made(args: argparse.Namespace, name: str, cut: dict[str, Any], texts: Texts, times: MeasuredTimes,
         checked: list[str]) -> list[Path]:  # fmt: skip
    """The exported model of each seed."""
    folders = []
    for seed in args.seeds:
        run = recipe(args, cut, texts, times, seed).run(args.output / "run")
        folder = args.output / f"exported-{run.stages[-1]['fingerprint']}"
        if not (folder / "hf_compress.json").is_file():
            export(load_model(run.model, device="cpu"), folder, format=args.runtime, calibration=checked)
        print(f"{name}, seed {seed}: {folder}", flush=True)
        folders.append(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="A fine-tuned classifier.")
    parser.add_argument("--data", type=Path, required=True, help="Texts and labels, as recipes take them.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runtime", choices=("openvino", "onnx"), default="openvino")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--tokens", type=int, default=32, help="Of the text that speed is measured on.")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = RecipeData(DataOptions(str(args.data)), Classification.name, needs_labels=True)
    model, tokenizer = load_model(args.model), data.tokenizer(args.model)
    checked = list(islice(data.training_texts(), CHECKED))
    measured = partial(measured_times, model, tokenizer, args.runtime, tokens=args.tokens, ranges=True)
    whole = measured()
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{whole.machine}, {told}: {whole.original:.2f} ms; {whole.structure}", flush=True)
    depth = len(anatomy(model).layers)
    texts, levels = Texts(data.count("train", labelled=True), 0), []
    for layers in args.layers:
        levels.append({})
        times = measured(wish=Wish("latency_ms", whole.structure.of(layers)))
        print(f"about {layers} of its layers: {times.structure}", flush=True)
        best = raced(args, depth, layers, texts, times)
        for way, cut in cuts(times, depth, layers, best).items():
            name = f"{way}, {times.structure.of(layers):.2f} ms"
            try:
                levels[-1][name] = made(args, name, cut, texts, times, checked)
            except ValueError as error:  # thin as they may be, so many layers take longer
                print(f"{name}: {error}", flush=True)
    options = EvaluateOptions(sequence_length=args.tokens, latency_rounds=60, throughput_rounds=12)
    models = {"original": [args.model]} | {name: found for level in levels for name, found in level.items()}
    report = evaluate(options, models, data, "scripts/benchmarks/structures.py")
    report.save(args.output)
    print(report.table(), flush=True)
    told_apart = EvaluateOptions(sequence_length=args.tokens, latency_rounds=1, throughput_rounds=1)
    for level in levels:
        ours, *others = evaluate(told_apart, level, data, "scripts/benchmarks/structures.py").entries
        for entry in others:
            low, value, high = (-100 * getattr(entry.difference.interval, end) for end in ("high", "value", "low"))
            print(f"{ours.name} less {entry.name}: {value:+.1f} points ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
