"""Compile every kernel and tile configuration for several GPUs, with no GPU at hand, and hold the result to its limits.

    python scripts/checks/static_gate.py                 # all; prints a table and exits with 1 when a limit is broken
    python scripts/checks/static_gate.py --short         # one of each kind, under a minute
    python scripts/checks/static_gate.py --only "4-bit"  # cases whose name contains the text
    python scripts/checks/static_gate.py --update        # also rewrites the reviewed numbers of the installed Triton

Read from the compiled code: registers, spills, shared memory, tensor-core and copy instructions, and the instructions
per weight in the main loop. Results are kept in `build/static_gate` by the content of the kernels, so that a second run
is quick. What a Triton makes of a kernel is its own: `tests/kernels/static_golden` holds, for each that a torch ships,
the registers and instructions that were reviewed, and growth over them is an error. Of another Triton only what holds
for any is checked: nothing spills, and everything fits the device.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default changes in Triton 3.10
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "triton_kernels" / "torch-ext"), str(ROOT)]

import triton  # noqa: E402
from hf_compress_kernels.tuning import SHARED_MEMORY  # noqa: E402

from scripts.checks.static_cases import Case, all_cases  # noqa: E402
from scripts.checks.static_code import measure  # noqa: E402

GOLDEN = ROOT / "tests" / "kernels" / "static_golden"
RELEASE = ".".join(triton.__version__.split(".")[:2])
TENSOR_MEMORY = 512  # columns
MAX_MORE_REGISTERS = 8
MAX_MORE_PER_WEIGHT = 0.05
# Where a Triton does otherwise than the newest: pattern of cases -> limits that take the place of theirs.
BEFORE_3_8 = {
    r"sm_(90|100) wna16_linear [248]-bit .* M=8 ": {"mma": "mma"},
    # the operands of all planes stay in tensor memory: too much, which a launch refuses, and a smaller tile runs
    r"sm_100 wna16_linear [234]-bit .* M=128 ": {"mma": "", "tensor_memory": 1032},
}
DIFFERENCES: dict[str, dict[str, dict]] = {
    "3.6": {**BEFORE_3_8, r"sm_80 wna16_linear 8-bit .* M=128 ": {"spills": 2, "local": 8}},
    "3.7": BEFORE_3_8,
    "3.8": {},
}
SHORT = (
    "wna16_linear 4-bit float16 M=8 g=128", "wna16_linear 3-bit bfloat16 M=16 g=128",
    "wna16_linear 8-bit float16 M=128 g=128", "wna16_dequant 3-bit float16", "bsr_linear 32x32 bfloat16 M=4096",
    "bsr_dx 32x32 bfloat16 M=4096", "bsr_dw 32x32 bfloat16", "kl", "kl_grad",
)  # fmt: skip
# name: (architecture, GB/s, multiprocessors, GHz, dense 16-bit TFLOP/s), from the makers' data sheets
CARDS = {
    "A100": ("sm_80", 1555, 108, 1.41, 312),
    "H100": ("sm_90", 3350, 132, 1.755, 989),
    "4090": ("sm_89", 1008, 128, 2.52, 165),
}
MMA_CYCLES = 8  # of a sub-core, for one HMMA.16816 of sm_80
ISSUE_SHARE = 0.65  # of the issue slots that a memory-bound kernel can be expected to fill


def limits_of(case: Case, release: str = RELEASE) -> dict:
    """The limits of a case when compiled by a release of Triton, e.g. "3.7"; none of its own in one that is unknown."""
    if release not in DIFFERENCES:
        return {}
    limits = dict(case.limits)
    for pattern, others in DIFFERENCES[release].items():
        if re.match(pattern, f"{case.key} "):
            limits |= others
    return limits


def broken_limits(case: Case, numbers: dict, golden: dict, release: str = RELEASE) -> list[str]:
    """Sentences about every limit that the numbers break."""
    limits = {"spills": 0, "local": 0, "tensor_memory": TENSOR_MEMORY, **limits_of(case, release)}
    problems = []
    if numbers["shared"] > SHARED_MEMORY[case.arch]:
        problems.append(f"shared memory is {numbers['shared']} bytes, the device has {SHARED_MEMORY[case.arch]}")
    for name in ("spills", "local", "tensor_memory", "per_weight", "loads"):
        if name in limits and numbers.get(name, 0) > limits[name]:
            problems.append(f"{name} is {numbers[name]}, at most {limits[name]}")
    if "issue_share" in limits:
        cycles = numbers["mma_in_loop"] * MMA_CYCLES
        if numbers["loop"] > cycles * limits["issue_share"]:
            problems.append(f"the loop issues {numbers['loop']} instructions in {cycles} tensor-core cycles")
    for name in ("programs", "buffers"):
        if name in limits and name in numbers and numbers[name] < limits[name]:
            problems.append(f"{name} is {numbers[name]}, at least {limits[name]}")
    wanted = limits.get("mma")
    if wanted and numbers["mma"] != wanted:
        problems.append(f"the tensor-core instruction is {numbers['mma'] or 'missing'}, expected {wanted}")
    for name, allowed in (("registers", MAX_MORE_REGISTERS), ("per_weight", MAX_MORE_PER_WEIGHT)):
        if name in golden and numbers[name] > golden[name] + allowed:
            problems.append(f"{name} grew from {golden[name]} to {numbers[name]}")
    return problems


def model_time_us(card: str, bits: int, M: int, N: int, K: int, per_weight: float) -> dict[str, float]:
    """The least time of x W^T, for M up to a tile, by each limit of a card, microseconds."""
    _, gigabytes, multiprocessors, gigahertz, teraflops = CARDS[card]
    issue = multiprocessors * 4 * 32 * gigahertz * 1e9 * ISSUE_SHARE  # thread instructions per second
    return {
        "memory": N * K * bits / 8 / (gigabytes * 1e9) * 1e6,
        "issue": N * K * per_weight / issue * 1e6,
        "tensor": 2 * M * N * K / (teraflops * 1e12) * 1e6,
    }


def choose(cases: list[Case], only: str, short: bool) -> list[int]:
    """The numbers of the cases that are wanted."""
    wanted = [i for i, case in enumerate(cases) if only in case.key]
    return [i for i in wanted if cases[i].name in SHORT and cases[i].arch in ("sm_80", "sm_90")] if short else wanted


def reviewed(release: str = RELEASE) -> dict[str, dict]:
    """The reviewed numbers of a release of Triton by case; none of one that is unknown."""
    path = GOLDEN / f"{release}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Compile only cases whose name or architecture contains this text.")
    parser.add_argument("--short", action="store_true", help="Compile one case of each kind.")
    parser.add_argument("--update", action="store_true", help="Store the numbers as the reviewed ones.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Compiler processes.")
    args = parser.parse_args()

    cases = all_cases()
    wanted = choose(cases, args.only, args.short)
    golden = {} if args.update and len(wanted) == len(cases) else reviewed()
    print(f"Triton {triton.__version__}")
    if RELEASE not in DIFFERENCES:
        print(f"No numbers of it were reviewed, only of {', '.join(DIFFERENCES)}: spills and sizes alone are checked.")
    failures = 0
    print("case".ljust(58), "regs  shared CTA/SM buffers      mma instr/weight")
    with ProcessPoolExecutor(args.jobs) as pool:
        for i, numbers in zip(wanted, pool.map(measure, wanted), strict=True):
            case = cases[i]
            problems = broken_limits(case, numbers, {} if args.update else golden.get(case.key, {}))
            columns = [
                numbers.get(name, "") for name in ("registers", "shared", "programs", "buffers", "mma", "per_weight")
            ]
            print(case.key.ljust(58), "{:>4} {:>7} {:>6} {:>7} {:>8} {:>12}".format(*columns))
            for problem in problems:
                print(f"    BROKEN: {problem}")
            failures += len(problems)
            golden[case.key] = {
                name: numbers[name]
                for name in ("registers", "per_weight")
                if name in numbers and numbers["tensor_memory"] <= TENSOR_MEMORY  # else it is never launched
            }
    print_model(golden)
    if args.update:
        GOLDEN.mkdir(exist_ok=True)
        text = json.dumps(dict(sorted(golden.items())), indent=1)
        (GOLDEN / f"{RELEASE}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(wanted)} cases, {failures} broken limits")
    return 1 if failures else 0


def print_model(golden: dict) -> None:
    """Predicted times of a 4096 x 4096 layer, 4 bit, from the compiled instructions per weight."""
    print("\nModel of a 4-bit 4096 x 4096 float16 layer, microseconds (memory / issue / tensor limit):")
    for card, (arch, *_) in CARDS.items():
        same_code = "sm_80" if arch == "sm_89" else arch
        for M in (8, 16, 32):
            numbers = golden.get(f"{same_code} wna16_linear 4-bit float16 M={M} g=128")
            if numbers:
                times = model_time_us(card, 4, M, 4096, 4096, numbers["per_weight"])
                print(f"  {card} M={M:<3d} " + " / ".join(f"{times[name]:.1f}" for name in times))


if __name__ == "__main__":
    sys.exit(main())
