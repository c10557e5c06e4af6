"""Processes of their own give the same figures as one process, in turns."""

import os

import pytest
from helpers import tiny_model

import hf_compress as hfc
from hf_compress.measuring.isolated import How, Worker
from hf_compress.measuring.measure import measure_sources
from hf_compress.measuring.turns import in_turns

HOW = dict(sequence_length=8, latency_rounds=3, throughput_rounds=2)


def test_two_processes_take_turns(tmp_path):
    folders = [tmp_path / "small", tmp_path / "packed"]
    tiny_model("bert", num_hidden_layers=2).save_pretrained(folders[0])
    hfc.quantize(tiny_model("bert"), bits=8).save_pretrained(folders[1])
    report = hfc.compare({folder.name: folder for folder in folders}, isolate=True, **HOW)
    for entry, folder in zip(report.entries, folders, strict=True):
        alone = hfc.measure(folder, **HOW)
        one = entry.measurement
        assert (one.parameters, one.stored_bytes, one.multiply_adds) == (
            alone.parameters, alone.stored_bytes, alone.multiply_adds)  # fmt: skip
        assert len(one.latency_ms.samples) == 3 and len(one.throughput.samples) == 2 and one.latency_ms.low > 0


class Pretended:
    def __init__(self, seconds):
        self.next = seconds

    def seconds(self, kind):
        return self.next


def test_only_the_time_in_the_processes_counts():
    assert in_turns([Pretended(1.0), Pretended(2.5)], "single", 4) == [[1.0] * 4, [2.5] * 4]


def test_a_process_that_fails_is_said(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="ended with code 1"):
        measure_sources([tmp_path], [tmp_path], How(8), isolate=True)
    assert "holds no model" in capfd.readouterr().err
    with pytest.raises(ValueError, match="give folders or Hub names"):
        hfc.compare({"a": tiny_model("bert")}, isolate=True)


def test_an_interruption_ends_the_processes_and_is_not_theirs(tmp_path, capfd):
    tiny_model("bert", num_hidden_layers=2).save_pretrained(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        Worker(tmp_path, How(8)) as worker,
    ):
        if hasattr(os, "getsid"):
            assert os.getsid(worker.process.pid) == worker.process.pid, "Ctrl-C does not reach it"
        raise KeyboardInterrupt  # before it has answered
    assert worker.process.returncode not in (None, 0)
    assert "Traceback" not in capfd.readouterr().err
