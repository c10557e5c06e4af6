"""The process of one model, for `isolated.Worker`: it reads what to load, writes what that costs as a line of JSON, and
then answers each line it reads, `single` or `batch`, with the seconds that one forward took.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch

from hf_compress.measuring.isolated import How
from hf_compress.measuring.measure import Local, evaluating, load_model, local_folder
from hf_compress.training.progress import quiet


def serve(request: dict, answer: Callable[[str], None]) -> None:
    """Load the model of `request` and answer what comes in until there is nothing more."""
    torch.set_num_threads(request["threads"])
    how = How.from_plain(request)
    model = load_model(request["source"], dtype=how.dtype, device=how.device)
    subject = Local(model, how, folder=local_folder(request["source"]))
    with evaluating([model]):
        answer(json.dumps(asdict(subject.cost())))
        for line in sys.stdin:
            answer(repr(subject.seconds(line.strip())))


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # answers alone go there
    os.dup2(2, 1)

    def answer(line: str) -> None:
        out.write(f"{line}\n")
        out.flush()

    with quiet():  # the process that asks says what matters
        serve(json.loads(sys.stdin.readline()), answer)
