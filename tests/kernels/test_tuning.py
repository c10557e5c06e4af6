"""Configurations: rules, tables and how they are measured."""

import json

import pytest
from hf_compress_kernels import tuning
from hf_compress_kernels.tuning import Device, TileConfig, bucket, read_table, rule, shared_memory, split_k

A100 = Device("NVIDIA_A100-SXM4-80GB", "sm_80", 108)


@pytest.fixture(autouse=True)
def empty_user_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    tuning._table.cache_clear()
    yield tmp_path / "hf_compress" / "kernels"
    tuning._table.cache_clear()


def entry(**changes):
    return dict(bits=4, group_size=128, M=16, N=4096, K=4096, block_m=16, block_n=64, num_warps=4, num_stages=4,
                split_k=4) | changes  # fmt: skip


def write(folder, device, *entries, version=1):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"wna16_linear.{device}.json"
    path.write_text(json.dumps({"version": version, "entries": entries}), encoding="utf-8")
    return path


@pytest.mark.parametrize(("M", "expected"), [(0, 1), (1, 1), (3, 2), (16, 16), (31, 16), (5000, 4096)])
def test_bucket_is_the_largest_not_above(M, expected):
    assert bucket(M) == expected


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}-bit".format)
def test_rules_fit_into_shared_memory_everywhere(arch, bits):
    for M in tuning.M_BUCKETS:
        config = rule(arch, bits, M)
        assert shared_memory(config, bits) <= tuning.SHARED_MEMORY[arch]
        assert config.block_m >= min(M, 16) or M <= 8


def test_split_fills_the_multiprocessors_but_keeps_the_pipeline_full():
    config = rule("sm_80", 4, 1)
    assert split_k(config, A100, 1, 4096, 32) == 8  # 32 tiles x 8 = 256 programs; 16 would leave two steps each
    assert split_k(config, A100, 1, 32768, 32) == 1
    assert split_k(config, A100, 1, 4096, 4) == 1
    assert split_k(rule("sm_80", 4, 64), A100, 64, 1024, 64) == 2
    assert split_k(rule("sm_80", 4, 128), A100, 128, 128, 64) == 1
    assert split_k(config._replace(split_k=16), A100, 1, 4096, 32) == 16


def test_without_a_table_the_rule_applies():
    assert tuning.linear_config(A100, 4, 128, 16, 4096, 4096) == rule("sm_80", 4, 16)


def test_nearest_shape_of_the_table_wins(empty_user_folder):
    write(empty_user_folder, "sm_80", entry(), entry(N=16384, K=16384, split_k=1), entry(M=1, split_k=8))
    assert tuning.linear_config(A100, 4, 128, 20, 5000, 4096) == TileConfig(16, 64, 4, 4, 4)
    assert tuning.linear_config(A100, 4, 128, 20, 14336, 14336).split_k == 1
    assert tuning.linear_config(A100, 4, 128, 1, 4096, 4096).split_k == 8
    assert tuning.linear_config(A100, 3, 128, 16, 4096, 4096) == rule("sm_80", 3, 16)


def test_a_device_table_beats_its_architecture(empty_user_folder):
    write(empty_user_folder, "sm_80", entry(num_stages=2))
    write(empty_user_folder, A100.name, entry(num_stages=3))
    assert tuning.linear_config(A100, 4, 128, 16, 4096, 4096).num_stages == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict(version=2), "not a table of version 1"),
        (dict(entry=entry(num_stages="4")), "needs the integers"),
        (dict(entry=entry(extra=1)), "needs the integers"),
        (dict(entry=entry(block_m=128, block_n=128, num_stages=9)), "bytes of shared memory"),
    ],
    ids=["version", "type", "key", "memory"],
)
def test_unusable_tables_are_refused(empty_user_folder, content, message):
    path = write(empty_user_folder, "sm_86", content.get("entry", entry()), version=content.get("version", 1))
    with pytest.raises(ValueError, match=message):
        read_table(path, "sm_86")


def test_dequantizing_starts_earlier_on_datacentre_cards():
    assert tuning.dequant_from(A100) == 512
    assert tuning.dequant_from(Device("NVIDIA_GeForce_RTX_4090", "sm_89", 128)) == 2048
    assert tuning.dequant_from(Device("Tesla_T4", "sm_75", 40)) == 0


class TestTune:
    pytest.importorskip("triton")

    def test_keeps_the_fastest_and_writes_after_every_shape(self, tmp_path):
        from hf_compress_kernels.tune import candidates, tune_linear
        from triton.runtime.errors import OutOfResources

        fastest = candidates(A100, 4, 16)[5]
        seen = []

        def time_config(config, bits, group_size, M, N, K):
            if config == candidates(A100, 4, M)[0]:
                raise OutOfResources(1, 0, "shared memory")
            if N == 64:
                raise KeyboardInterrupt
            seen.append(config)
            return 1.0 if config == fastest else 2.0

        with pytest.raises(KeyboardInterrupt):
            tune_linear([(4096, 4096), (64, 64)], rows=[16], folder=tmp_path, device=A100, time_config=time_config)
        path = tmp_path / f"wna16_linear.{A100.name}.json"
        ((stored,),) = read_table(path, "sm_80").values()
        assert TileConfig(*(stored[name] for name in TileConfig._fields)) == fastest
        assert len(seen) <= 24

        tune_linear([(4096, 4096)], rows=[16], folder=tmp_path, device=A100, time_config=lambda *args: 1.0)
        assert len(json.loads(path.read_text(encoding="utf-8"))["entries"]) == 1

    def test_candidates_are_few_distinct_and_start_with_the_rule(self):
        from hf_compress_kernels.tune import candidates

        for arch in ("sm_80", "sm_86", "gfx942"):
            for M in (1, 16, 64, 1024):
                found = candidates(Device(arch, arch, 80), 4, M)
                assert found[0] == rule(arch, 4, M)
                assert len(set(found)) == len(found) <= 24
                assert all(shared_memory(c, 4) <= tuning.SHARED_MEMORY[arch] for c in found)

    def test_needs_a_gpu(self, monkeypatch):
        import torch
        from hf_compress_kernels.tune import tune_linear

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="there is none"):
            tune_linear([(64, 64)])
