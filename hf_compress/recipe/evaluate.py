"""Compares what a recipe has made with what it began with, on the test texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig

from hf_compress.files.whole import write_whole
from hf_compress.formats.runtimes.opened import exported_format
from hf_compress.measuring.measure import is_exported, load_model
from hf_compress.measuring.metrics import Metric
from hf_compress.measuring.rouge import rouge
from hf_compress.model.reading import num_positions_of
from hf_compress.recipe.data import RecipeData
from hf_compress.recipe.options import RecipeError, unknown
from hf_compress.recipe.publish import runnable_exports
from hf_compress.recipe.stage import Past, Stage, Work
from hf_compress.recipe.tasks.embedding import NUMBER, Embeddings
from hf_compress.recipe.tasks.language import Seq2Seq
from hf_compress.report.compare import compare
from hf_compress.report.harness import harness_scores, has_harness
from hf_compress.report.headline import headline
from hf_compress.report.report import Report
from hf_compress.report.vectors import agreement, agreement_metric, text_vectors

ROUGE = "rouge"


@dataclass
class EvaluateOptions:
    """Quality, size and speed of the model now, beside those of other stages."""

    models: str | None = field(
        default=None,
        metadata={"help": "Stages to compare the model with, with commas, the reference first; `input` is the model "
                          "that the recipe began with. By default the last fine-tuned one, else `input`."},
    )  # fmt: skip
    split: str = field(default="test", metadata={"help": "test, validation or train."})
    sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of the texts that speed is measured on; the data's max_length."}
    )
    batch_size: int = field(default=32, metadata={"help": "Of the evaluation; speed is always measured at 1 and 32."})
    latency_rounds: int = field(default=200, metadata={"help": "How often the latency of each model is taken."})
    throughput_rounds: int = field(default=30, metadata={"help": "How often the throughput of each model is taken."})
    float32: bool = field(default=False, metadata={"help": "Run all models in float32; by default as each is stored."})

    isolate: bool | None = field(
        default=None,
        metadata={
            "help": "Measure each model in a process of its own; by default where one is packed and another "
            "not, or in other bits."
        },
    )
    tasks: str | None = field(
        default=None, metadata={"help": "Tasks of lm-eval, with commas, for language models; needs lm_eval."}
    )
    metric: str = field(
        default="usual", metadata={"help": f"The usual one of the task, or {ROUGE} for sequence to sequence."}
    )
    tasks_limit: int | None = field(default=None, metadata={"help": "Use only so many examples of each task."})

    def __post_init__(self):
        if self.split not in ("test", "validation", "train"):
            raise ValueError(f"split must be test, validation or train, got {self.split!r}.")
        if self.metric not in ("usual", ROUGE):
            raise ValueError(f"metric must be usual or {ROUGE}, got {self.metric!r}.")
        if min(self.batch_size, self.latency_rounds, self.throughput_rounds) < 1:
            raise ValueError("batch_size, latency_rounds and throughput_rounds must be at least 1.")
        for name in ("sequence_length", "tasks_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.tasks and not has_harness():
            raise ValueError("tasks of lm-eval need it installed: pip install lm_eval")

    def check(self, model: str | Path, task: str) -> None:
        """Raise RecipeError for what a model, or a task, cannot be asked for."""
        if self.metric == ROUGE and task != Seq2Seq.name:
            raise RecipeError(f"metric: {ROUGE} is of texts that are written, of the task {Seq2Seq.name}; got {task}.")
        longest = None if is_exported(model) else num_positions_of(AutoConfig.from_pretrained(model))
        if longest is not None and (self.sequence_length or 0) > longest:
            raise RecipeError(f"sequence_length is {self.sequence_length}, but {model} reads {longest} tokens at most.")

    def names(self) -> list[str]:
        return [name.strip() for name in self.models.split(",")] if self.models else []


Sources = str | Path | Sequence[str | Path]


def evaluate(options: EvaluateOptions, models: Mapping[str, Sources], data: RecipeData, command: str) -> Report:
    """Compare `models`, the reference first; a list holds the seeds of one thing.

    Each model is read with the tokenizer beside it, since vocabularies may have been cut.
    """
    data.check_labelled(options.split)
    for name, sources in models.items():
        options.check(_first(sources), data.task)
        data.check_length(_first(sources))
        if options.tasks and is_exported(_first(sources)):
            raise RecipeError(f"tasks of lm-eval run on models in PyTorch: leave out {name}, an exported folder.")
    rows, collators, metrics = {}, {}, {}
    for name, sources in models.items():
        source = _first(sources)
        config = AutoConfig.from_pretrained(source)
        data.check_labels(config, name)
        tokenizer = data.tokenizer(source)
        rows[name] = data.tokenized(tokenizer, config, measured=True)[options.split]
        collators[name] = data.collator(tokenizer)
        metrics[name] = rouge(tokenizer) if options.metric == ROUGE else None
    if data.task == Embeddings.name:
        metrics = _agreements(models, rows, collators, options.batch_size)
    report = compare(
        models,
        eval_dataset=rows,
        data_collator=collators,
        metric=metrics if any(metrics.values()) else None,
        dataset_name=f"{data.name}, {options.split}",
        batch_size=options.batch_size,
        sequence_length=options.sequence_length or data.max_length,
        latency_rounds=options.latency_rounds,
        throughput_rounds=options.throughput_rounds,
        dtype=torch.float32 if options.float32 else None,
        isolate=len(set(map(_engine, models.values()))) > 1 if options.isolate is None else options.isolate,
        command=command,
    )
    report = replace(report, data_notes=data.notes)
    if not options.tasks:
        return report
    scores = {}
    for name, sources in models.items():
        source = _first(sources)
        wanted = [task.strip() for task in options.tasks.split(",")]
        scores[name] = harness_scores(load_model(source), data.tokenizer(source), wanted, limit=options.tasks_limit)
    return replace(report, tasks=scores)


def _agreements(
    models: Mapping[str, Sources], rows: Mapping[str, Dataset], collators: Mapping[str, Callable], batch_size: int
) -> dict[str, Metric]:
    """Of embedders, how far each goes with the first."""
    several = [name for name, one in models.items() if not isinstance(one, (str, Path)) and len(one) > 1]
    if several:
        raise RecipeError(f"Embedders are compared one by one, but {several[0]} holds several: give each a name.")
    vectors = {}
    for name, sources in models.items():
        texts = rows[name].remove_columns(NUMBER)
        model = load_model(_first(sources))
        vectors[name] = text_vectors(model, _first(sources), texts, collators[name], batch_size)
    reference = next(iter(vectors.values()))
    return {name: agreement_metric(agreement(own, reference), NUMBER) for name, own in vectors.items()}


def _first(sources: Sources) -> str | Path:
    return sources if isinstance(sources, (str, Path)) else sources[0]


def _engine(sources: Sources) -> str:
    """What says which engines a model runs on: they may keep threads of their own, and touch those of others.

    Models on the same engines are measured in one process, where both are on the same cores: of two processes, a busy
    machine may slow one for as long as it lives. An exported folder brings a runtime of its own.
    """
    if is_exported(_first(sources)):
        return str(exported_format(Path(_first(sources))))
    config = AutoConfig.from_pretrained(_first(sources))
    record = (getattr(config, "quantization_config", None) or {}).get("bits") or {}
    widths = {(entry.get("bits"), entry.get("activation_bits")) for entry in record.values()}
    return repr((sorted(widths, key=str), config.dtype if record else None))


def main_figures(report: Report) -> dict[str, Any]:
    """The main figures of each model, plain, for the record of a stage."""
    return {
        entry.name: {
            "quality": entry.quality,
            "stored_bytes": entry.measurement.stored_bytes,
            "byte_rate": entry.byte_rate,
            "throughput_speed_up": entry.throughput_speed_up.value,
            "latency_speed_up": entry.latency_speed_up.value,
        }
        for entry in report.entries
    }


class Evaluate(Stage):
    needs_labels = True

    @property
    def split(self) -> str:
        return self.own.split

    def of_stages(self):
        return self.own.names()

    def check(self, model, data):
        self.own.check(model, data.task)

    def models(self, past: Past) -> dict[str, str | Path]:
        """name -> folder of what is compared, exports within the recipe's output, the model itself before them."""
        known = {one.name: one.source for one in past.models}
        names = [*(self.own.names() or [past.reference.name]), past.last.name]
        for name in names:
            if name not in known:
                raise unknown(name, known, "evaluate: the stage")
        return {name: known[name] for name in names}

    def needs(self, past: Past) -> dict[str, str]:
        chosen = self.models(past)
        others = {one.name: one.fingerprint for one in past.models if one.name in chosen}
        return others | runnable_exports(past)  # folders that are named by fingerprints

    def run(self, work: Work) -> dict[str, Any]:
        exports = {name: work.output / place for name, place in runnable_exports(work.past).items()}
        report = evaluate(self.own, self.models(work.past) | exports, work.data, work.command)
        for name, content in report.files().items():
            write_whole(work.folder / name, content)
        return {"model": work.past.last.fingerprint, "told": headline(report), "figures": main_figures(report)}
