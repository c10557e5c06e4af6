"""One cell of the board: a method on a subject with a seed, made by its recipe and measured like all others."""

import logging
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence.methods import Method
from evidence.subjects import Subject

from hf_compress.files.whole import discard
from hf_compress.measuring.measure import load_model
from hf_compress.measuring.metrics import MeanOf, metric_for
from hf_compress.measuring.quality import example_scores, usable_rows
from hf_compress.recipe.data import DataOptions, RecipeData
from hf_compress.recipe.options import RecipeError
from hf_compress.report.compare import compare
from hf_compress.report.result import Interval
from hf_compress.version import __version__

SUBJECT = "as stored"  # the row of a subject itself
MAIN = "evidence.cells"


@dataclass(frozen=True)
class Rounds:
    """How often latency and throughput of subject and cell are taken, in turns."""

    latency: int = 40
    throughput: int = 3


@dataclass(frozen=True)
class Cell:
    subject: Subject
    method: Method | None  # None for the subject itself
    seed: int
    output: Path
    rounds: Rounds = Rounds()

    @property
    def name(self) -> str:
        return f"{self.subject.name}/{self.method.name if self.method else SUBJECT}"

    @property
    def folder(self) -> Path:
        return self.output / "cells" / self.subject.name / f"{self.method.name}-{self.seed}"

    @property
    def key(self) -> dict[str, Any]:
        """What makes a record the record of this cell, once its subject is made."""
        method = {"method": SUBJECT, "kind": "", "recipe": self.subject.facts["recipe"]}
        if self.method:
            method = {"method": self.method.name, "kind": self.method.kind, "recipe": self.method.digest}
        return {"subject": self.subject.name, **method, "seed": self.seed,
                "fingerprint": self.subject.facts["fingerprint"]}  # fmt: skip

    def make(self) -> dict[str, Any]:
        """Run the recipe, or go on with it, and measure what it ends with. Raises RecipeError naming the cell."""
        facts, model, seconds = self.subject.prepare(), self.subject.model, 0.0
        if self.method is None:
            seconds = facts["seconds"]
        else:
            data, task = {**self.method.recipe.data, **self.subject.texts}, self.subject.recipe.task
            recipe = self.method.recipe.changed(model=str(model), data=data, seed=self.seed, task=task)
            try:
                result = recipe.run(self.folder)
            except ValueError as error:
                raise RecipeError(f"{self.name}, {self.method.kind}/{self.method.name}.yaml: {error}") from error
            seconds, model = sum(stage["seconds"] for stage in result.stages), Path(result.model)
        memory = peak_memory_bytes()
        of_texts = {} if self.method else {name: facts[name] for name in ("overlap", "test_texts")}
        return {**self.key, "texts": self.method.trained_texts if self.method else None, "seconds": round(seconds, 1),
                  "peak_memory_bytes": memory, **of_texts, **self._quality(model), **self._cost(model)}  # fmt: skip

    def forget(self) -> None:
        """Delete what the recipe left, once the record is kept."""
        if self.method is not None:
            discard(self.folder)

    def _quality(self, model: Path) -> dict[str, Any]:
        """What the model answers to the test texts."""
        data = RecipeData(DataOptions(**self.subject.texts), self.subject.recipe.task)
        opened, tokenizer = load_model(model), data.tokenizer(model)
        rows = usable_rows(data.tokenized(tokenizer, opened.config, measured=True)["test"], opened)
        metric = metric_for(opened, rows)
        if not isinstance(metric.total, MeanOf):
            raise RecipeError(f"{self.name}: {metric.name} is no mean over texts, which rows of the board are.")
        scores = example_scores(opened, rows, data.collator(tokenizer), metric=metric, batch_size=32)
        answers = scores[:, metric.total.column]
        return {"metric": metric.name, "examples": len(rows), "quality": answers.mean().item(),
                "answers": packed(answers.tolist())}  # fmt: skip

    def _cost(self, model: Path) -> dict[str, Any]:
        """Size and speed, in turns with the subject as it is stored, in PyTorch."""
        models = {SUBJECT: self.subject.model} | ({"cell": model} if self.method else {})
        length = self.subject.recipe.data.get("max_length", 128)
        report = compare(
            models, sequence_length=length, latency_rounds=self.rounds.latency, command="",
            throughput_rounds=self.rounds.throughput, isolate=torch.get_num_threads() > 1,
        )  # fmt: skip
        entry = report.entries[-1]
        cost = entry.measurement
        return {
            "parameters": cost.parameters, "stored_bytes": cost.stored_bytes, "bits_per_weight": cost.bits_per_weight,
            "zeros": cost.sparsity.get("weights", 0.0), "multiply_add_rate": report.multiply_add_rate(entry),
            "latency": plain(entry.latency_speed_up), "throughput": plain(entry.throughput_speed_up),
            "latency_ms": cost.latency_ms.median, "device": cost.device, "threads": cost.threads, "length": length,
            "versions": {**cost.versions, "hf_compress": __version__},
        }  # fmt: skip


def plain(interval: Interval) -> list[float]:
    return [round(number, 4) for number in (interval.value, interval.low, interval.high)]


def packed(answers: Sequence[float]) -> str:
    """Right and wrong as bits in hexadecimal, the first text first. Raises ValueError for scores between."""
    if any(answer not in (0.0, 1.0) for answer in answers):
        raise ValueError("answers are right or wrong, 1 or 0.")
    bits = "".join(str(int(answer)) for answer in answers)
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}" if bits else ""


def unpacked(text: str, number: int) -> list[int]:
    """The inverse of `packed`, of so many answers."""
    return [int(bit) for bit in f"{int(text, 16):0{number}b}"] if number else []


def peak_memory_bytes() -> int | None:
    """The most that this process has held at one time; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def make_apart(cell: Cell) -> dict[str, Any]:
    """`cell.make()` in a process of its own, so that its memory is its own. Raises RecipeError as it does, else
    RuntimeError where the process ends without an answer."""
    context = multiprocessing.get_context()
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([MAIN])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(cell, send, torch.get_num_threads()), daemon=True)
    process.start()
    send.close()
    try:
        kind, answer = receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{cell.name}: the process ended with code {process.exitcode}.") from None
    process.join()
    if kind is not None:
        raise kind(answer)
    return answer


def _answer(cell: Cell, send: Any, threads: int) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(threads)
    try:
        send.send((None, cell.make()))
    except RecipeError as error:
        send.send((RecipeError, str(error)))
    finally:
        send.close()
