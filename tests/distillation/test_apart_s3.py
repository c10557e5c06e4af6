"""Workers that write one cache to S3, of a local server, and die."""

import uuid

import fsspec
import pytest
from machine import needs_fork

from distillation.data import rows
from distillation.test_apart import QUICK, Killed, assert_whole, exit_code, forked, kill_one_of_four, killed_at
from distillation.test_cache import teacher_of
from hf_compress.distillation.teachers.cache import cache_teacher


@pytest.fixture
def bucket(monkeypatch):
    """The address of a bucket yet to be made, on a server in this process."""
    moto = pytest.importorskip("moto.server", reason="moto is a local S3 server")
    pytest.importorskip("s3fs", reason="fsspec reaches S3 by s3fs")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a",
                        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield f"s3://{uuid.uuid4().hex}"  # servers of one process know each other's
    server.stop()


@needs_fork
@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_one_of_four_processes_is_killed_at_random(seed, bucket):
    """Processes of their own look at the store, since s3fs survives no fork."""
    data = rows(40, seed=seed)
    assert exit_code(forked(lambda: fsspec.filesystem("s3").mkdir(bucket))) == 0
    kill_one_of_four(f"{bucket}/{seed}", data, seed, 3)
    assert exit_code(forked(lambda: assert_whole(f"{bucket}/{seed}", data))) == 0


def test_a_worker_that_dies_at_any_moment_costs_one_shard(bucket, monkeypatch):
    fsspec.filesystem("s3").mkdir(bucket)
    cache_teacher(teacher_of(), rows(11), f"{bucket}/cache", worker=(0, 1), **QUICK)
    assert_whole(f"{bucket}/cache", rows(11))
    for moment in (1, 3, 4, 5, 13):  # no lease; a lease; a shard without note; a note and a lease; the third part
        place, options = f"{bucket}/{moment}", {"worker": (0, 2), **QUICK}
        with monkeypatch.context() as patched:
            killed_at(moment, patched)
            with pytest.raises(Killed):
                cache_teacher(teacher_of(), rows(11), place, **options)
        cache_teacher(teacher_of(), rows(11), place, **{**options, "worker": (1, 2)})
        assert_whole(place, rows(11))
    with pytest.raises(ValueError, match="s3://no-such-bucket/cache cannot be used"):
        cache_teacher(teacher_of(), rows(11), "s3://no-such-bucket/cache", worker=(0, 1), **QUICK)
