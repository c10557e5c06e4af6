"""What word-level losses in chunks cost beside plain PyTorch, from hidden states to gradients: peak memory of a process
of its own for each, and processor time in turns (a busy machine changes the clock's time, not this).

    python scripts/benchmarks/word_level.py             batch 8, length 512, vocabulary 49,152, width 576
    python scripts/benchmarks/word_level.py --batch_size 2 --length 8 --vocabulary 512 --steps 1
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_compress.distillation.losses.chunked_head import head_losses
from hf_compress.distillation.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from hf_compress.measuring.measure import device_name, versions
from hf_compress.measuring.timing import Spread

DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen-shannon": partial(jensen_shannon, beta=0.5)}


@dataclass
class BenchmarkArguments:
    batch_size: int = field(default=8, metadata={"help": "Examples in a step."})
    length: int = field(default=512, metadata={"help": "Tokens in an example."})
    vocabulary: int = field(default=49152, metadata={"help": "Tokens that the heads tell apart."})
    width: int = field(default=576, metadata={"help": "Width of the hidden states of both models."})
    chunk_size: int = field(default=256, metadata={"help": "Positions in a chunk."})
    steps: int = field(default=5, metadata={"help": "Measured turns; one more warms up."})
    output: str | None = field(default=None, metadata={"help": "A JSON file for the figures."})
    only: str | None = field(default=None, metadata={"help": "Run one step of this, and print the peak memory."})


def main():
    args = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0]
    if args.only:
        before = peak_bytes()
        way, divergence = args.only.split(" ")
        step(args, way, divergence, *make_heads(args))
        print(json.dumps({"before": before, "peak": peak_bytes()}))
        return
    # a process starts with the peak of the one that starts it: so before anything large is made here
    memories = {d: {way: in_own_process(args, f"{way} {d}") for way in ("plain", "chunks")} for d in DIVERGENCES}
    figures, heads = {}, make_heads(args)
    print(
        f"{'':16}{'peak memory, plain':>20}{'chunks':>10}{'ratio':>8}{'time, plain':>14}{'ratio (10-90% of turns)':>28}"
    )
    for divergence in DIVERGENCES:
        memory = memories[divergence]
        plain, ratios = in_turns(args, divergence, heads)
        peak = {way: used["peak"] for way, used in memory.items()}
        ratio = peak["chunks"] / peak["plain"]
        figures[divergence] = {"memory": memory, "plain_seconds": plain, "time_ratio": asdict(ratios)}
        print(
            f"{divergence:16}{peak['plain'] / 2**20:16.0f} MiB{peak['chunks'] / 2**20:6.0f} MiB{ratio:7.2f}x"
            f"{1000 * plain:11.0f} ms{ratios.median:12.2f}x ({ratios.low:.2f} to {ratios.high:.2f})",
            flush=True,
        )
    print(
        f"\n{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, float32, batch {args.batch_size}, "
        f"length {args.length}, vocabulary {args.vocabulary}, width {args.width}, chunks of {args.chunk_size}; memory "
        f"of the whole process; {', '.join(f'{n} {v}' for n, v in versions().items())}"
    )
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1), encoding="utf-8")


def make_heads(args: BenchmarkArguments) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    student, teacher = (nn.Linear(args.width, args.vocabulary, bias=False) for _ in range(2))
    return student, teacher.requires_grad_(False)


def step(args: BenchmarkArguments, way: str, divergence: str, head: nn.Linear, teacher_head: nn.Linear) -> None:
    """Half the cross entropy, half the distance to the teacher, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    positions = args.batch_size * args.length
    states, teacher_states = torch.randn(2, positions, args.width, generator=generator)
    labels = torch.randint(args.vocabulary, (positions,), generator=generator)
    states.requires_grad_()
    if way == "plain":
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_states)
        logits = head(states)
        loss = 0.5 * F.cross_entropy(logits, labels, reduction="sum") + 0.5 * PLAIN[divergence](logits, teacher_logits)
    else:
        loss = head_losses(
            states, head, [teacher_states], teacher_head, labels, DIVERGENCES[divergence],
            temperature=1.0, task_weight=0.5, soft_weight=0.5, chunk_size=args.chunk_size,
        ).total  # fmt: skip
    (loss / positions).backward()
    head.weight.grad = None


def plain_forward(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="sum", log_target=True)


def plain_reverse(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return plain_forward(teacher_logits, logits)


def plain_jensen_shannon(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_p = torch.stack([logits.log_softmax(-1), teacher_logits.log_softmax(-1)])
    log_m = log_p.logsumexp(0) - torch.tensor(2.0).log()
    return 0.5 * sum(F.kl_div(log_m, one, reduction="sum", log_target=True) for one in log_p)


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": plain_forward,
    "reverse": plain_reverse,
    "jensen-shannon": plain_jensen_shannon,
}


def in_own_process(args: BenchmarkArguments, only: str) -> dict[str, int]:
    options = {**asdict(args), "only": only, "output": None}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def in_turns(args: BenchmarkArguments, divergence: str, heads: tuple[nn.Linear, nn.Linear]) -> tuple[float, Spread]:
    """Processor seconds of a plain step, and those of a chunked one over them."""
    seconds: dict[str, list[float]] = {"plain": [], "chunks": []}
    for turn in range(args.steps + 1):
        for way in sorted(seconds, reverse=turn % 2 == 0):
            start = time.process_time()
            step(args, way, divergence, *heads)
            if turn:
                seconds[way].append(time.process_time() - start)
    ratios = [mine / theirs for mine, theirs in zip(seconds["chunks"], seconds["plain"], strict=True)]
    return Spread.of(seconds["plain"]).median, Spread.of(ratios)


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
