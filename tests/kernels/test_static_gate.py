"""The static gate: what it reads from compiled code, what it refuses, and a few kernels compiled for real."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hf_compress_kernels.dispatch import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in ROOT.glob("tests/kernels/static_golden/*.json")}

SASS = """
.L_x_1:
        /*0010*/                   LDG.E R1, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0030*/                   LDGSTS.E [R3], [R4.64] ;
        /*0040*/                   HMMA.16816.F32 R8, R8, R12, RZ ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def gate():
    from scripts.checks import static_gate

    return static_gate


@pytest.fixture(scope="module")
def code():
    from scripts.checks import static_code

    return static_code


def test_main_loop_is_the_one_with_tensor_cores(code):
    loop = code.main_loop(SASS)
    assert len(loop) == 3
    assert "HMMA" in loop[1]


def test_main_loop_without_tensor_cores_is_the_longest(code):
    assert len(code.main_loop(SASS.replace("HMMA.16816", "FFMA"))) == 4


def test_buffers_are_counted_from_the_deepest_ring(code):
    ttgir = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<3x128x32xi16, #shared, #smem, mutable>
    %b = ttg.local_alloc : () -> !ttg.memdesc<2x32x8xf16, #shared1, #smem, mutable>
    """
    assert code.count_buffers(ttgir) == 3
    assert code.count_buffers("") == 0


GOOD = dict(registers=100, local=0, spills=0, shared=30000, per_weight=2.0, programs=5, buffers=3, loads=0, mma="mma",
            loop=250, mma_in_loop=16)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(spills=2), "spills is 2, at most 0"),
        (dict(local=16), "local is 16, at most 0"),
        (dict(shared=200_000), "shared memory"),
        (dict(tensor_memory=513), "tensor_memory is 513, at most 512"),
        (dict(per_weight=2.3), "per_weight is 2.3, at most 2.2"),
        (dict(programs=2), "programs is 2, at least 3"),
        (dict(buffers=1), "buffers is 1, at least 3"),
        (dict(loads=1), "loads is 1, at most 0"),
        (dict(mma=""), "tensor-core instruction is missing"),
        (dict(registers=109), "registers grew from 100 to 109"),
        (dict(per_weight=2.1), "per_weight grew from 2.0 to 2.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_broken_limit_is_named(gate, change, message):
    case = case_of(gate, "sm_80 wna16_linear 4-bit float16 M=8 g=128")
    golden = dict(registers=100, per_weight=2.0)
    assert gate.broken_limits(case, GOOD, golden, "3.8") == []
    (problem,) = gate.broken_limits(case, {**GOOD, **change}, {} if "per_weight is" in message else golden, "3.8")
    assert message in problem


def case_of(gate, key: str):
    return next(case for case in gate.all_cases() if case.key == key)


def test_issue_limit_of_block_sparse_kernels(gate):
    case = case_of(gate, "sm_80 bsr_linear 32x32 bfloat16 M=4096")
    numbers = dict(GOOD, mma_in_loop=10, loop=81)
    assert any("issues 81 instructions in 80" in p for p in gate.broken_limits(case, numbers, {}, "3.8"))


def test_limits_are_those_of_the_triton_that_compiled(gate):
    case = case_of(gate, "sm_90 wna16_linear 4-bit float16 M=8 g=128")
    numbers = dict(GOOD, mma="mma")
    for release in ("3.6", "3.7"):
        assert gate.broken_limits(case, numbers, {}, release) == []
        assert gate.broken_limits(case, dict(numbers, mma=""), {}, release)
    (problem,) = gate.broken_limits(case, numbers, {}, "3.8")
    assert "instruction is mma, expected wgmma" in problem
    large = case_of(gate, "sm_100 wna16_linear 4-bit float16 M=128 g=128")
    numbers = dict(GOOD, mma="", tensor_memory=528)
    assert gate.broken_limits(large, numbers, {}, "3.7") == [] != gate.broken_limits(large, numbers, {}, "3.8")


def test_of_an_unknown_triton_only_what_holds_for_any_is_checked(gate, monkeypatch, capsys):
    case = case_of(gate, "sm_80 wna16_linear 4-bit float16 M=8 g=128")
    slower = dict(GOOD, per_weight=9.0, programs=1, buffers=0, loads=5, mma="")
    assert gate.broken_limits(case, slower, gate.reviewed("9.9"), "9.9") == []
    (problem,) = gate.broken_limits(case, dict(slower, spills=1), {}, "9.9")
    assert "spills is 1, at most 0" in problem
    monkeypatch.setattr(gate, "RELEASE", "9.9")
    monkeypatch.setattr(sys, "argv", ["static_gate.py", "--only", "no such case"])
    assert gate.main() == 0
    assert "No numbers of it were reviewed, only of 3.6, 3.7, 3.8" in capsys.readouterr().out


def test_the_short_form_holds_one_case_of_each_kernel(gate):
    cases = gate.all_cases()
    short = [cases[i] for i in gate.choose(cases, "", short=True)]
    assert {case.name for case in short} == set(gate.SHORT)
    assert {case.name.split()[0] for case in short} >= {"wna16_linear", "wna16_dequant", "bsr_linear", "bsr_dw", "kl"}
    assert len(short) <= 20


def test_cases_have_distinct_names_and_every_release_its_reviewed_numbers(gate):
    keys = [case.key for case in gate.all_cases()]
    assert len(set(keys)) == len(keys)
    assert set(GOLDEN) == set(gate.DIFFERENCES)
    assert all(set(golden) == set(keys) for golden in GOLDEN.values())


def test_the_triton_that_is_installed_is_one_that_a_pytorch_ships(gate):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.partition(";")[0].strip().split("==") for line in lines if "==" in line.partition(";")[0])
    ships = {"2.11": "3.6", "2.13": "3.7", "2.14": "3.8"}
    torch_release, triton_release = (".".join(pinned[name].split(".")[:2]) for name in ("torch", "triton"))
    assert ships[torch_release] == triton_release
    assert triton_release in gate.DIFFERENCES


def test_cache_key_follows_the_configuration(gate, code):
    case = gate.all_cases()[0]
    assert code.fingerprint(case) == code.fingerprint(gate.all_cases()[0])
    assert code.fingerprint(case) != code.fingerprint(replace(case, num_stages=case.num_stages + 1))


@pytest.mark.parametrize("release", sorted(GOLDEN))
def test_targets_of_the_design_are_met_by_the_reviewed_numbers(release):
    """Instructions per weight, reviewed from compiled code; the gate refuses growth over them."""
    golden = GOLDEN[release]
    for arch, four, three in (("sm_80", 2.2, 3.6), ("sm_90", 2.5, 4.0)):
        assert golden[f"{arch} wna16_linear 4-bit float16 M=8 g=128"]["per_weight"] <= four
        assert golden[f"{arch} wna16_linear 3-bit float16 M=8 g=128"]["per_weight"] <= three
        assert golden[f"{arch} wna16_linear 8-bit float16 M=8 g=128"]["per_weight"] <= 2.6


@pytest.mark.parametrize(
    "only", ["sm_80 wna16_linear 4-bit float16 M=8 g=128", "sm_90 bsr_linear 64x64", "gfx942 kl_grad"]
)
def test_compiled_for_real(only):
    command = [sys.executable, str(ROOT / "scripts" / "checks" / "static_gate.py"), "--only", only, "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 broken limits" in done.stdout
    assert only in done.stdout
