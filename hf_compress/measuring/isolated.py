"""Models measured each in a process of its own, in turns: the threads and memory of one do not touch another's.

Run as a module this is such a process. It loads one model, writes what it costs as a line of JSON, and then answers
each line it reads, `single` or `batch`, with the seconds that one forward took.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hf_compress.measuring.measure import (
    LATENCY_BATCH,
    Measurement,
    evaluating,
    load_model,
    local_folder,
    measure_together,
)
from hf_compress.measuring.timing import Spread, synchronize, time_interleaved
from hf_compress.model.inputs import THROUGHPUT_BATCH, example_batch

KINDS = {"single": LATENCY_BATCH, "batch": THROUGHPUT_BATCH}


class Worker:
    """The process of one model. A context manager, which ends it."""

    def __init__(self, source: str | Path, *, sequence_length: int, dtype: torch.dtype | None, device: str | None):
        request = {"source": str(source), "sequence_length": sequence_length, "device": device,
                   "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}  # fmt: skip
        self.source = source
        command = [sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(request)]
        # a session of its own: Ctrl-C is for the one who measures, who ends the others without their tracebacks
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # nobody waits for its answer any more
            self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def cost(self) -> Measurement:
        """What the model costs; speeds are of one round."""
        plain = json.loads(self._line())
        spreads = {name: Spread.of(plain[name]["samples"]) for name in ("latency_ms", "throughput")}
        return Measurement(**{**plain, **spreads})

    def seconds(self, kind: str) -> float:
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process that measures {self.source} ended with code {self.process.wait()}.")
        return line


def measure_isolated(
    sources: Sequence[str | Path],
    *,
    sequence_length: int = 128,
    latency_rounds: int = 50,
    throughput_rounds: int = 10,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> list[Measurement]:
    """As `measure_together`, of folders or Hub names, with a process for each. All of them hold their model at once.

    Raises RuntimeError if a process ends early; what it said stands in the error stream.
    """
    with ExitStack() as stack:
        options = {"sequence_length": sequence_length, "dtype": dtype, "device": device}
        workers = [stack.enter_context(Worker(source, **options)) for source in sources]
        costs = [worker.cost() for worker in workers]
        latencies = _in_turns(workers, "single", latency_rounds)
        seconds = _in_turns(workers, "batch", throughput_rounds)
    return [
        replace(cost, latency_ms=Spread.of([1e3 * t for t in single]),
                throughput=Spread.of([THROUGHPUT_BATCH / t for t in batch]))
        for cost, single, batch in zip(costs, latencies, seconds, strict=True)
    ]  # fmt: skip


def _in_turns(workers: Sequence[Worker], kind: str, rounds: int) -> list[list[float]]:
    """Seconds as the processes themselves took them: the way to them and back does not count."""
    spent = 0.0

    def call(worker: Worker) -> Callable[[], None]:
        def run() -> None:
            nonlocal spent
            spent += worker.seconds(kind)

        return run

    return time_interleaved([call(worker) for worker in workers], rounds=rounds, clock=lambda: spent)


def serve(request: dict, answer: Callable[[str], None]) -> None:
    """Load the model of `request` and answer what comes in until there is nothing more."""
    dtype = request["dtype"] and getattr(torch, request["dtype"])
    model = load_model(request["source"], dtype=dtype, device=request["device"])
    length = request["sequence_length"]
    folders = [local_folder(request["source"])]
    rounds = {"latency_rounds": 1, "throughput_rounds": 1}
    (cost,) = measure_together([model], folders=folders, sequence_length=length, **rounds)
    answer(json.dumps(asdict(cost)))
    batch = example_batch(model, sequence_length=length)
    with evaluating([model]), torch.inference_mode():
        for line in sys.stdin:
            inputs = {name: value[: KINDS[line.strip()]] for name, value in batch.items()}
            start = time.perf_counter()
            model(**inputs)
            synchronize(model.device)
            answer(repr(time.perf_counter() - start))


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # answers alone go there
    os.dup2(2, 1)

    def answer(line: str) -> None:
        out.write(f"{line}\n")
        out.flush()

    serve(json.loads(sys.argv[1]), answer)
