"""What is worth knowing from a few minutes of a GPU: are the kernels right, how fast are they, which tiles suit it.

    make gpu                                                          # on the machine with the GPU
    python scripts/checks/device.py --stages products --seconds 120
    TRITON_INTERPRET=1 python scripts/checks/device.py --small        # the same in small, on any machine

Stages run in order of value, each in a process of its own with a bound on its seconds: an illegal access or a hang
costs that stage alone. Without a GPU (and without --small) the tests are collected and skip, and the other stages say
why they do not run. What each printed is kept in `OUTPUT/STAGE.txt`, figures in `OUTPUT/STAGE.json`; the summary comes
last.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("4096x4096", "8192x8192", "576x1536", "1536x576")  # of a language model of 7B, a large layer, SmolLM2's
ROWS = ("1", "8", "16", "64", "256", "1024")
TINY = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--bits", "4", "--group_size", "32",
        "--rounds", "1", "--prompt", "8", "--new_tokens", "4"]  # fmt: skip
NO_GPU = "there is no GPU of CUDA or ROCm: torch.cuda.is_available() is False"


def stages(output: Path, small: bool) -> dict[str, tuple[float, list[str], bool]]:
    """name -> (seconds, command, whether it needs a GPU)."""
    python, tests = sys.executable, [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider"]
    bench = [python, "scripts/benchmarks/kernel_times.py"]
    kinds = {
        "products": ["linear", "--bits", "2", "3", "4", "8", "--shapes", *SHAPES, "--rows", *ROWS],
        "blocks": ["bsr", "--shapes", *SHAPES[:2], "--rows", "16", "1024", "--density", "0.1", "0.2"],
        "losses": ["kl", "--vocabulary", "151936", "--rows", "256", "1024"],
    }
    tiny = ["--model", "tiny", "--dtype", "float16"]
    timed = {name: [*bench, *(options[:1] + tiny if small else options), "--output", str(output / f"{name}.json")]
             for name, options in kinds.items()}  # fmt: skip
    quick = ["tests/kernels/test_launch.py"] if small else ["-m", "gpu and not long", "tests/kernels"]
    tune = [python, "-m", "hf_compress.commands.main", "tune", "--shapes", ",".join(SHAPES)]
    write = [python, "scripts/benchmarks/generation.py", "--output", str(output / "generation.json")]
    write += TINY if small else ["--bits", "4", "3", "--rounds", "3"]
    found = {"tests": (150, [*tests, *quick], False), "products": (80, timed["products"], not small),
             "generation": (100, write, not small)}  # fmt: skip
    if not small:
        found["tune"] = (60, tune, True)
    return {**found, "blocks": (35, timed["blocks"], not small), "losses": (35, timed["losses"], not small)}


def run(name: str, command: list[str], output: Path, seconds: float) -> str:
    """One stage. Returns how it ended, in words."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels" / "torch-ext"), str(ROOT / "tests")])
    begin, log = time.monotonic(), output / f"{name}.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=file,
                                  stderr=subprocess.STDOUT, timeout=seconds)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"FAILED: not done in {seconds:.0f} s"
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    took = time.monotonic() - begin
    return f"passed in {took:.0f} s" if done.returncode == 0 else f"FAILED with code {done.returncode}: {lines[-1:]}"


def describe() -> str:
    versions = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        return f"{versions}: {NO_GPU}"
    properties = torch.cuda.get_device_properties(0)
    return f"{versions}: {properties.name}, {properties.multi_processor_count} multiprocessors"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/device"), help="Folder for logs and figures.")
    parser.add_argument("--seconds", type=float, default=470, help="In all.")
    parser.add_argument("--stages", nargs="+", help="Some of them only.")
    parser.add_argument("--small", action="store_true", help="Small shapes, on any machine.")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end, ends = time.monotonic() + args.seconds, {}
    for name, (seconds, command, needs_gpu) in stages(output, args.small).items():
        if args.stages and name not in args.stages:
            continue
        left = min(seconds, end - time.monotonic())
        if needs_gpu and not torch.cuda.is_available():
            ends[name] = f"skipped: {NO_GPU}"
        elif left <= 0:
            ends[name] = "FAILED: no time was left"
        else:
            ends[name] = run(name, command, output, seconds if args.small else left)
    print("\n".join([describe(), *(f"{name:12}{how}" for name, how in ends.items())]))
    return int(any(how.startswith("FAILED") for how in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
