"""The benchmark of scale runs, and its model of the costs agrees with what a cache takes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from machine import needs_proc

from hf_compress.distillation.teachers.apart import ENVIRONMENTS
from hf_compress.distillation.teachers.draws import draw

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "benchmarks"))
import scale  # noqa: E402
import sharded_memory  # noqa: E402

TINY = [
    f"--{name}={value}"
    for name, value in dict(classes=64, hidden=16, layers=2, length=12, examples=8, batch=2, steps=3, draws=8).items()
]


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["scale.py", *map(str, words)])
    scale.main()


def test_a_worker_caches_and_a_process_trains(tmp_path, monkeypatch, capsys):
    for name in (name for names in ENVIRONMENTS for name in names if name):
        monkeypatch.delenv(name, raising=False)
    for what in ("cache", "training"):
        called(monkeypatch, "worker", f"--what={what}", f"--folder={tmp_path / 'cache'}", *TINY)
        begin, end = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert end > begin


def test_costs_by_hand(monkeypatch, capsys):
    """1e9 tokens through 7e9 parameters are 1.4e19 operations: 7.86 hours at half of 989e12 a second."""
    called(monkeypatch, "cost", "--utilisation=0.5")
    text = capsys.readouterr().out
    assert "teacher, once                      7.9 GPU hours" in text
    assert "student                            5.1 GPU hours" in text
    assert "64 largest                     388.0 bytes" in text and "32 draws, at most               99.0 bytes" in text


@pytest.mark.parametrize("entropy", [0.5, 2.0, 3.5])
def test_the_bytes_of_a_prediction_are_those_that_are_stored(entropy):
    """Over all starts of the draws: their mean number of different classes is worked out from the probabilities."""
    p = scale.zipf(500, entropy)
    assert float(torch.special.entr(p).sum()) == pytest.approx(entropy, rel=1e-6)
    starts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    drawn = draw(p.log().expand(2000, -1), starts, 16)
    stored = sum(t.numel() * t.element_size() for t in drawn) / 2000
    # the share of starts that reach a class is exact to 1 / 2000, and the classes that some start reaches are few
    assert stored == pytest.approx(scale.drawn_bytes(500, 16, entropy), rel=1e-2)


def test_the_mean_of_draws_is_nearer_than_the_largest_logits(monkeypatch, capsys):
    called(monkeypatch, "gradient", *TINY, "--classes=300", "--starts=1000")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        words = line.replace(",", "").replace(";", "").split()
        bias, mean = float(words[words.index("bias") + 1]), float(words[words.index("mean") + 1])
        assert mean < 0.05 * bias


@pytest.mark.long
@needs_proc
def test_the_memory_of_ranks_is_told_beside_the_losses_of_one_process(monkeypatch, capfd):
    words = ["--hidden", 64, "--layers", 2, "--classes", 512, "--length", 16, "--steps", 2, "--processes", 1, 2]
    monkeypatch.setattr(sys, "argv", ["sharded_memory.py", *map(str, words)])
    sharded_memory.main()
    told = [line.split("losses ") for line in capfd.readouterr().out.splitlines() if "losses" in line]
    assert [line[0].split()[0] for line in told] == ["1", "2"]
    assert all(int(line[0].split()[2].replace(",", "")) > 0 for line in told)
    assert json.loads(told[0][1]) == pytest.approx(json.loads(told[1][1]), rel=1e-5)
