"""The scripts of the kernels, run as a user would, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("linear", "wna16_linear"),
        pytest.param("bsr", "bsr_linear", marks=pytest.mark.long),
        pytest.param("kl", "kl_from_logits", marks=pytest.mark.long),
    ],
    ids=lambda x: x,
)
def test_benchmark_times_us_against_the_dense_product(what, name, tmp_path):
    output = tmp_path / "rows.json"
    run("scripts/benchmarks/kernel_times.py", what, "--model", "tiny", "--output", str(output))
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["device"]["device"]
    rows = [row for row in report["rows"] if row["name"] == name]
    assert rows
    assert all(row["low_us"] <= row["median_us"] <= row["high_us"] and row["ratio"] > 0 for row in rows)


@pytest.mark.long
def test_without_a_gpu_its_tests_skip_and_it_is_said_why(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `make gpu` runs everything")
    said = run("scripts/checks/device.py", "--output", str(tmp_path))
    assert "tests       passed" in said and "skipped" in said.partition("tests       ")[0]
    for stage in ("products", "generation", "tune", "blocks", "losses"):
        assert f"{stage:12}skipped: there is no GPU of CUDA or ROCm: torch.cuda.is_available() is False" in said


@pytest.mark.long
def test_the_small_form_passes_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = run("scripts/checks/device.py", "--small", "--output", str(tmp_path))
    assert said.count(" passed in ") == 5
    assert {file.name for file in tmp_path.glob("*.json")} == {
        "products.json",
        "generation.json",
        "blocks.json",
        "losses.json",
    }


def test_publishing_dry_run_builds_checks_and_lists():
    pytest.importorskip("kernels")
    pytest.importorskip("tomllib")
    listed = run("scripts/publish_kernels.py", "--dry-run", "--repo-id", "someone/kernels")
    assert "build/torch-cuda/wna16_kernels.py" in listed
    assert "README.md" in listed
    assert "nothing was sent to someone/kernels" in listed


def test_only_a_committed_tree_is_published(monkeypatch, tmp_path):
    pytest.importorskip("tomllib")
    from scripts import publish_kernels

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "new.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(publish_kernels, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="Commit first"):
        publish_kernels.check_tree()
