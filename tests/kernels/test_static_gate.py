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
GOLDEN = json.loads((ROOT / "tests" / "kernels" / "static_golden.json").read_text(encoding="utf-8"))

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
    from scripts import static_gate

    return static_gate


def test_main_loop_is_the_one_with_tensor_cores(gate):
    loop = gate.main_loop(SASS)
    assert len(loop) == 3
    assert "HMMA" in loop[1]


def test_main_loop_without_tensor_cores_is_the_longest(gate):
    assert len(gate.main_loop(SASS.replace("HMMA.16816", "FFMA"))) == 4


def test_buffers_are_counted_from_the_deepest_ring(gate):
    ttgir = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<3x128x32xi16, #shared, #smem, mutable>
    %b = ttg.local_alloc : () -> !ttg.memdesc<2x32x8xf16, #shared1, #smem, mutable>
    """
    assert gate.count_buffers(ttgir) == 3
    assert gate.count_buffers("") == 0


GOOD = dict(registers=100, local=0, spills=0, shared=30000, per_weight=2.0, programs=5, buffers=3, loads=0, mma="mma",
            loop=250, mma_in_loop=16)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(spills=2), "spills is 2"),
        (dict(local=16), "local is 16"),
        (dict(shared=200_000), "shared memory"),
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
    case = next(c for c in gate.all_cases() if c.name == "wna16_linear 4-bit float16 M=8 g=128" and c.arch == "sm_80")
    golden = dict(registers=100, per_weight=2.0)
    assert gate.broken_limits(case, GOOD, golden) == []
    (problem,) = gate.broken_limits(case, {**GOOD, **change}, {} if "at most" in message else golden)
    assert message in problem


def test_issue_limit_of_block_sparse_kernels(gate):
    case = next(c for c in gate.all_cases() if c.name == "bsr_linear 32x32 bfloat16 M=4096" and c.arch == "sm_80")
    numbers = dict(GOOD, mma_in_loop=10, loop=81)
    assert any("issues 81 instructions in 80" in p for p in gate.broken_limits(case, numbers, {}))


def test_cases_have_distinct_names_and_reviewed_numbers(gate):
    keys = [f"{case.arch} {case.name}" for case in gate.all_cases()]
    assert len(set(keys)) == len(keys)
    assert set(GOLDEN) == set(keys)


def test_cache_key_follows_the_configuration(gate):
    case = gate.all_cases()[0]
    assert gate.fingerprint(case) == gate.fingerprint(gate.all_cases()[0])
    assert gate.fingerprint(case) != gate.fingerprint(replace(case, num_stages=case.num_stages + 1))


def test_targets_of_the_design_are_met_by_the_reviewed_numbers():
    """Instructions per weight, reviewed from compiled code; the gate refuses growth over them."""
    for arch, four, three in (("sm_80", 2.2, 3.6), ("sm_90", 2.5, 4.0)):
        assert GOLDEN[f"{arch} wna16_linear 4-bit float16 M=8 g=128"]["per_weight"] <= four
        assert GOLDEN[f"{arch} wna16_linear 3-bit float16 M=8 g=128"]["per_weight"] <= three
        assert GOLDEN[f"{arch} wna16_linear 8-bit float16 M=8 g=128"]["per_weight"] <= 2.6


@pytest.mark.parametrize(
    "only", ["sm_80 wna16_linear 4-bit float16 M=8 g=128", "sm_90 bsr_linear 64x64", "gfx942 kl_grad"]
)
def test_compiled_for_real(only):
    command = [sys.executable, str(ROOT / "scripts" / "static_gate.py"), "--only", only, "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 broken limits" in done.stdout
    assert only in done.stdout
