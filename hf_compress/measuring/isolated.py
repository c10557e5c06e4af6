"""Models measured each in a process of its own: the threads and memory of one do not touch another's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_compress.measuring.measurement import Measurement

CHILD = "hf_compress.measuring.served"


@dataclass(frozen=True)
class How:
    """What a model is run on, and as what. Travels to other processes."""

    sequence_length: int = 128
    inputs: Mapping[str, Tensor] | None = None  # real examples instead of random tokens
    dtype: torch.dtype | None = None  # for a model that is loaded there, as is the device
    device: str | None = None

    def plain(self) -> dict:
        inputs = self.inputs and {name: value.tolist() for name, value in self.inputs.items()}
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"sequence_length": self.sequence_length, "inputs": inputs, "dtype": dtype, "device": self.device}

    @classmethod
    def from_plain(cls, plain: dict) -> "How":
        inputs = plain["inputs"] and {name: torch.tensor(value) for name, value in plain["inputs"].items()}
        return cls(plain["sequence_length"], inputs, plain["dtype"] and getattr(torch, plain["dtype"]), plain["device"])


class Worker:
    """The process of one model, with as many threads as this one has. A context manager, which ends it."""

    def __init__(self, source: str | Path, how: How):
        self.source = source
        command = [sys.executable, "-c", f"from {CHILD} import main; main()"]
        # a session of its own: Ctrl-C is for the one who measures, who ends the others without their tracebacks
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}  # its profiler warns of tensors that were there before
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True, env=quiet
        )
        self._say(json.dumps({"source": str(source), "threads": torch.get_num_threads(), **how.plain()}))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # nobody waits for its answer any more
            self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def cost(self) -> Measurement:
        return Measurement.from_plain(json.loads(self._line()))

    def seconds(self, kind: str) -> float:
        self._say(kind)
        return float(self._line())

    def _say(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _line(self) -> str:
        """Its next answer. Raises RuntimeError if it ended; what it said stands in the error stream."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process that measures {self.source} ended with code {self.process.wait()}.")
        return line
