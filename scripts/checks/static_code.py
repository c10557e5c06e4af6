"""Compile a kernel for a GPU that is not there, and read the machine code: registers, spills, instructions, buffers."""

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scripts.checks.static_cases import Case, all_cases

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "static_gate"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSOR = {  # shared memory in bytes and threads
    "sm_80": (164 * 1024, 2048), "sm_86": (100 * 1024, 1536), "sm_89": (100 * 1024, 1536),
    "sm_90": (228 * 1024, 2048), "sm_100": (228 * 1024, 2048),
}  # fmt: skip


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
    numbers["tensor_memory"] = getattr(compiled.metadata, "tmem_size", None) or 0
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


def fingerprint(case: Case) -> str:
    """Changes whenever the compiled code may."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in (inspect.getsourcefile(case.kernel.fn), __file__):
        digest.update(Path(path).read_bytes())
    shape = (case.name, case.arch, case.constants, case.signature, case.num_warps, case.num_stages, case.options,
             case.multiples_of_16, case.weights)  # fmt: skip
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
