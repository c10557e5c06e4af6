"""Compile every kernel and tile configuration for several GPUs, with no GPU at hand, and hold the result to its limits.

    python scripts/static_gate.py                 # all; prints a table and exits with 1 when a limit is broken
    python scripts/static_gate.py --only "4-bit"  # cases whose name contains the text
    python scripts/static_gate.py --update        # also rewrites tests/kernels/static_golden.json

Read from the compiled code: registers, spills, shared memory, tensor-core and copy instructions, and the instructions
per weight in the main loop. Results are kept in `build/static_gate` by the content of the kernels, so that a second run
is quick. The golden file holds the registers and instructions that were reviewed; growth over it is an error.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default changes in Triton 3.10

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "triton_kernels" / "torch-ext" / "hf_compress_kernels"
sys.path[:0] = [str(KERNELS.parent), str(ROOT)]

import triton  # noqa: E402
from hf_compress_kernels.tuning import SHARED_MEMORY  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from scripts.static_cases import Case, all_cases  # noqa: E402

GOLDEN = ROOT / "tests" / "kernels" / "static_golden.json"
CACHE = ROOT / "build" / "static_gate"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MAX_MORE_REGISTERS = 8
MAX_MORE_PER_WEIGHT = 0.05
MULTIPROCESSOR = {  # shared memory in bytes and threads
    "sm_80": (164 * 1024, 2048), "sm_86": (100 * 1024, 1536), "sm_89": (100 * 1024, 1536),
    "sm_90": (228 * 1024, 2048), "sm_100": (228 * 1024, 2048),
}  # fmt: skip
# name: (architecture, GB/s, multiprocessors, GHz, dense 16-bit TFLOP/s), from the makers' data sheets
CARDS = {
    "A100": ("sm_80", 1555, 108, 1.41, 312),
    "H100": ("sm_90", 3350, 132, 1.755, 989),
    "4090": ("sm_89", 1008, 128, 2.52, 165),
}
MMA_CYCLES = 8  # of a sub-core, for one HMMA.16816 of sm_80
ISSUE_SHARE = 0.65  # of the issue slots that a memory-bound kernel can be expected to fill


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_case(case: Case) -> dict:
    """What the compiled code of one case looks like."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.multiples_of_16
    }
    source = ASTSource(case.kernel, signature, case.constants, aligned)
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages, **case.options)
    compiled = triton.compile(source, target=target(case.arch), options=options)
    numbers = read_cuda(compiled) if case.arch.startswith("sm_") else read_amd(compiled)
    numbers["shared"] = compiled.metadata.shared
    if case.weights and "loop" in numbers:
        numbers["per_weight"] = round(numbers["loop"] * case.num_warps * 32 / case.weights, 2)
    if case.arch in MULTIPROCESSOR:
        shared, threads = MULTIPROCESSOR[case.arch]
        per_thread = -(-numbers["registers"] // 8) * 8
        numbers["programs"] = min(
            65536 // (per_thread * 32 * case.num_warps),
            threads // (32 * case.num_warps),
            shared // (numbers["shared"] + 1024),
        )
    return numbers


def read_cuda(compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run("cuobjdump", "-res-usage", cubin)
        sass = run("nvdisasm", "-c", cubin)
    ptx = compiled.asm["ptx"]
    loop = main_loop(sass)
    kinds = {"wgmma": "wgmma.mma", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loop": len(loop),
        "mma": next((kind for kind, text in kinds.items() if text in ptx), ""),
        "mma_in_loop": sum(bool(TENSOR.search(line)) for line in loop),
        "copies": sum("LDGSTS" in line or "UTMALDG" in line for line in loop),
        "loads": sum(bool(re.search(r"\bLDG\b", line)) for line in loop),
        "buffers": count_buffers(compiled.asm["ttgir"]),
    }


def read_amd(compiled) -> dict:
    code = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    return {
        "registers": count("vgpr_count"),
        "local": count("private_segment_fixed_size"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "mma": "mfma" if "v_mfma" in code else "",
    }


def run(tool: str, *args: object) -> str:
    return subprocess.run([BINARIES / tool, *args], capture_output=True, text=True, check=True).stdout


TENSOR = re.compile(r"\b(?:HMMA|HGMMA|IMMA|UTC\w*MMA)")


def main_loop(sass: str) -> list[str]:
    """The instructions of the longest loop, of those with a tensor-core instruction where there is one."""
    lines, labels = [], {}
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(lines)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    loops = []
    for end, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if branch and labels.get(branch[1], end + 1) < end:
            loops.append(lines[labels[branch[1]] : end + 1])
    with_mma = [loop for loop in loops if any(TENSOR.search(line) for line in loop)]
    return max(with_mma or loops or [[]], key=len)


def count_buffers(ttgir: str) -> int:
    """Stages of the deepest ring of shared-memory buffers that the pipeliner made; 0 without one."""
    rings = re.findall(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    return max(map(int, rings), default=0)


def broken_limits(case: Case, numbers: dict, golden: dict) -> list[str]:
    """Sentences about every limit that the numbers break."""
    problems = [f"{name} is {numbers[name]}, must be 0" for name in ("spills", "local") if numbers[name]]
    if numbers["shared"] > SHARED_MEMORY[case.arch]:
        problems.append(f"shared memory is {numbers['shared']} bytes, the device has {SHARED_MEMORY[case.arch]}")
    for name in ("per_weight", "loads"):
        if name in case.limits and numbers.get(name, 0) > case.limits[name]:
            problems.append(f"{name} is {numbers[name]}, at most {case.limits[name]}")
    if "issue_share" in case.limits:
        cycles = numbers["mma_in_loop"] * MMA_CYCLES
        if numbers["loop"] > cycles * case.limits["issue_share"]:
            problems.append(f"the loop issues {numbers['loop']} instructions in {cycles} tensor-core cycles")
    for name in ("programs", "buffers"):
        if name in case.limits and name in numbers and numbers[name] < case.limits[name]:
            problems.append(f"{name} is {numbers[name]}, at least {case.limits[name]}")
    wanted = case.limits.get("mma")
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


def fingerprint(case: Case) -> str:
    """Changes whenever the compiled code may."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in [*sorted(KERNELS.glob("*_kernels.py")), Path(__file__)]:
        digest.update(path.read_bytes())
    shape = (case.name, case.arch, case.constants, case.signature, case.num_warps, case.num_stages, case.weights)
    digest.update(repr(shape).encode())
    return digest.hexdigest()[:24]


def measure(index: int) -> dict:
    """The numbers of case `index`, from the cache or compiled."""
    case = all_cases()[index]
    path = CACHE / f"{fingerprint(case)}.json"
    if not path.is_file():
        numbers = compile_case(case)
        CACHE.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Compile only cases whose name or architecture contains this text.")
    parser.add_argument("--update", action="store_true", help="Store the numbers as the reviewed ones.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Compiler processes.")
    args = parser.parse_args()

    cases = all_cases()
    wanted = [i for i, case in enumerate(cases) if args.only in f"{case.arch} {case.name}"]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    failures = 0
    print("case".ljust(58), "regs  shared CTA/SM buffers      mma instr/weight")
    with ProcessPoolExecutor(args.jobs) as pool:
        for i, numbers in zip(wanted, pool.map(measure, wanted), strict=True):
            case, key = cases[i], f"{cases[i].arch} {cases[i].name}"
            problems = broken_limits(case, numbers, {} if args.update else golden.get(key, {}))
            columns = [
                numbers.get(name, "") for name in ("registers", "shared", "programs", "buffers", "mma", "per_weight")
            ]
            print(key.ljust(58), "{:>4} {:>7} {:>6} {:>7} {:>8} {:>12}".format(*columns))
            for problem in problems:
                print(f"    BROKEN: {problem}")
            failures += len(problems)
            golden[key] = {name: numbers[name] for name in ("registers", "per_weight") if name in numbers}
    print_model(golden)
    if args.update:
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n", encoding="utf-8")
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
