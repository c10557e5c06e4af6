"""Workers started apart write one cache: whole whoever dies when, in the order of the text, no example twice."""

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from machine import needs_fork
from transformers import default_data_collator

from distillation.data import rows
from distillation.test_cache import config, counting, student_of, teacher_of
from hf_compress.distillation.teachers import apart, far_shards
from hf_compress.distillation.teachers.apart import Leases, worker_here
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.cache_files import MANIFEST
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.example_keys import example_keys
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.files.store import Store

SIZE = 4  # examples a part
QUICK = dict(shard_size=SIZE, batch_size=2, lease_seconds=0.2)


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    return tmp_path / "cache" if request.param == "local" else f"memory://{uuid.uuid4().hex}/cache"


def assert_whole(place, data):
    """Every example once, in parts in the order of the text, with the teacher's logits; nothing else lies there."""
    cached = CachedTeacher(place)
    keys = [example_keys(default_data_collator(list(data.select(range(i, min(i + SIZE, len(data)))))), ["input_ids"])
            for i in range(0, len(data), SIZE)]  # fmt: skip
    found = [cached._shards[i]["keys"] for i in range(len(cached._shards))]
    assert len(found) == len(keys)
    for mine, theirs in zip(found, keys, strict=True):
        assert mine.sort().values.tolist() == theirs.sort().values.tolist()
    batch = default_data_collator(list(data))
    with torch.no_grad():
        torch.testing.assert_close(cached.look_up(batch)[0]["logits"], teacher_of()(**batch).logits)
    names = set(Store(place).sizes())
    assert names == {MANIFEST, *cached.manifest["shards"], *(f"part-{i:06}.json" for i in range(len(keys)))}


def test_workers_share_the_text(place):
    data, teachers = rows(19), [teacher_of() for _ in range(3)]
    seen = [counting(teacher) for teacher in teachers]

    def work(number):
        cache_teacher(teachers[number], data, place, worker=(number, 3), **{**QUICK, "lease_seconds": 60})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(place, data)
    assert sum(sum(one) for one in seen) == 19 + 3 * 2  # each looks at two examples to learn what there is
    late = teacher_of()
    looked = counting(late)
    assert len(cache_teacher(late, data, place, worker=(1, 2), **QUICK)) == 19 and sum(looked) == 2


class Killed(BaseException):
    """The end of a process, after which it does nothing any more."""


def killed_at(moment, monkeypatch):
    """A context in which the `moment`-th change of any store, and all after it, kill."""
    count = itertools.count()

    def deadly(real):
        def change(self, *args):
            if next(count) >= moment:
                raise Killed
            return real(self, *args)

        return change

    for name in ("write", "create", "remove"):
        monkeypatch.setattr(Store, name, deadly(getattr(Store, name)))


def test_a_worker_that_dies_at_any_moment_costs_one_shard(place, tmp_path, monkeypatch):
    data, moments, robbed = rows(11), 0, 0
    for moment in range(100):
        here = f"{place}-{moment}" if isinstance(place, str) else tmp_path / str(moment)
        teacher = teacher_of()
        seen = counting(teacher)
        with monkeypatch.context() as patched:
            killed_at(moment, patched)
            try:
                cache_teacher(teacher, data, here, worker=(0, 2), **{**QUICK, "lease_seconds": 60})  # none is renewed
                break
            except Killed:
                moments += 1
        robbed += any(name.endswith(".lease") for name in Store(here).sizes())
        before = sum(seen)
        cache_teacher(teacher, data, here, worker=(1, 2), **QUICK)
        assert_whole(here, data)
        looked = 2 + 2
        assert sum(seen) <= 11 + looked + SIZE and before <= 11 + 2
    # A manifest; of each of three parts the lease (asked for and, far away, written), shard, note, end of the lease;
    # the manifest.
    in_part = 5 if isinstance(place, str) else 4
    assert moments == 1 + 3 * in_part + 1 and robbed == 3 * 3


def forked(work):
    """The number of a process of its own that does `work`; pytest shows why where a check of its exit code fails."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_one_of_four(place, data, seed, latest):
    """Four processes write a cache, of which one is killed within `latest` seconds; the others end well."""
    generator = random.Random(seed)
    children = [
        forked(lambda number=number: cache_teacher(teacher_of(), data, place, worker=(number, 4), **QUICK))
        for number in range(4)
    ]
    victim = generator.randrange(4)
    time.sleep(generator.uniform(0, latest))
    os.kill(children[victim], signal.SIGKILL)
    codes = [exit_code(pid) for pid in children]
    assert all(code == 0 for number, code in enumerate(codes) if number != victim)


@needs_fork
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 20))])
def test_one_of_four_processes_is_killed_at_random(seed, tmp_path):
    data = rows(40, seed=seed)
    kill_one_of_four(tmp_path / "cache", data, seed, 0.5)
    names = {name for name in Store(tmp_path / "cache").sizes() if ".writing" not in name}
    assert not any(name.endswith(".lease") for name in names)
    for left in (tmp_path / "cache").glob(".*.writing"):
        left.unlink()  # half a file of the killed one, which nobody reads
    assert_whole(tmp_path / "cache", data)


@pytest.mark.parametrize("looks", [0, 1])
def test_a_file_that_goes_while_files_are_listed_is_not_missed(looks, tmp_path, monkeypatch):
    """Another worker gives its lease back between the listing of a folder and a first or second look at its files."""
    for name in ("shard", "lease"):
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    plain, left = Path.stat, itertools.count(looks, -1)

    def stat(path, **options):
        if path.name == "lease" and next(left) == 0:
            path.unlink()
        return plain(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert Store(tmp_path).sizes().items() >= {"shard": 5}.items()


def test_a_worker_that_is_slow_is_not_robbed(monkeypatch, place):
    """As long as it renews its lease; clocks of two machines are never compared."""
    now = [0.0]
    monkeypatch.setattr(apart.time, "monotonic", lambda: now[0])
    slow, other, third = (Leases(Store(place), 10) for _ in range(3))
    assert slow.take(7) and not other.take(7) and not slow.take(7)
    for _ in range(10):
        now[0] += 6
        slow.renew(7)
        assert not other.take(7)
    now[0] += 9.9
    assert not other.take(7)
    now[0] += 0.2
    assert not third.take(7)  # which has seen it just now
    assert other.take(7) and not third.take(7)
    other.give_back(7)
    assert third.take(7)


@pytest.mark.parametrize("kind", ["datasets", "unknown-columns"])
def test_a_stream_gives_the_same_cache(kind, tmp_path):
    data = rows(11)
    stream = data.to_iterable_dataset(num_shards=2)
    stream = stream.map(lambda row: row) if kind == "unknown-columns" else stream
    for name, source in (("rows", data), ("stream", stream)):
        cache_teacher(teacher_of(), source, tmp_path / name, worker=(0, 1), **QUICK)
    batch = default_data_collator(list(data))
    one, two = (CachedTeacher(tmp_path / name).look_up(batch)[0]["logits"] for name in ("rows", "stream"))
    assert torch.equal(one, two)


def test_far_shards_are_fetched_once_in_the_order_of_the_text(tmp_path, monkeypatch, caplog):
    data, read, logs = rows(20, kind="clm"), [], []
    teacher = teacher_of("llama")
    far = f"memory://{uuid.uuid4().hex}/cache"
    fetch = far_shards.FarShards._fetch
    monkeypatch.setattr(far_shards.FarShards, "_fetch", lambda self, n: (read.append(n), fetch(self, n))[1])
    monkeypatch.setattr(far_shards, "MOST_SHARDS", 2)
    for place in (tmp_path / "near", far):
        cache_teacher(teacher, data, place, draws=8, worker=(0, 1), **QUICK)
        options = dict(hints=None, temperature=1.0, train_sampling_strategy="sequential", max_steps=10)
        args = config(tmp_path, **options, per_device_train_batch_size=2)
        trainer = DistillationTrainer(student_of(teacher), args, teacher_model=place, train_dataset=data)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1] and len(logs[0]) == 10
    assert read == [0, 1, 2, 3, 4] and not caplog.text
    assert trainer.teacher.bytes_per_token == CachedTeacher(tmp_path / "near").bytes_per_token
    for order in ([0, 8, 16, 4, 12], [16, 0, 8]):  # one row of each part
        for row in order:
            trainer.teacher.look_up(default_data_collator([data[row]]))
    assert caplog.text.count("are fetched again and again") == 1


def test_a_far_shard_that_was_altered_is_refused_when_it_is_read():
    data, place = rows(8), f"memory://{uuid.uuid4().hex}/cache"
    cached = cache_teacher(teacher_of(), data, place, hidden_states=(1,), worker=(0, 1), **QUICK)
    name = next(iter(cached.manifest["shards"]))
    store = Store(place)
    content = store.read(name)
    store.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    batch = default_data_collator(list(data))
    with pytest.raises(ValueError, match=f"{name} was altered since the cache was written"):
        CachedTeacher(place).look_up(batch, (1,))
    store.write(name, content[:-1])
    with pytest.raises(ValueError, match="1 of 2 shards .* are damaged"):
        CachedTeacher(place)
    cache_teacher(teacher_of(), data, place, hidden_states=(1,), worker=(0, 1), **QUICK)
    assert CachedTeacher(place).look_up(batch, (1,))[1][1].shape == (8, 12, 32)


def test_a_near_shard_that_was_altered_is_written_again(tmp_path, caplog):
    data = rows(11)
    cached = cache_teacher(teacher_of(), data, tmp_path, worker=(0, 1), **QUICK)
    file = tmp_path / list(cached.manifest["shards"])[1]
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    cache_teacher(teacher_of(), data, tmp_path, worker=(0, 1), **QUICK)
    assert "Writing part 1 of" in caplog.text
    assert_whole(tmp_path, data)


def test_what_does_not_belong_together_is_refused(tmp_path, monkeypatch):
    data, far = rows(8), f"memory://{uuid.uuid4().hex}/cache"
    for place in (tmp_path / "apart", far):
        cache_teacher(teacher_of(), data, place, worker=(0, 1), **QUICK)
        for other in (rows(9), rows(8, seed=5)):
            with pytest.raises(ValueError, match="belongs to another text"):
                cache_teacher(teacher_of(), other, place, worker=(0, 1), **QUICK)
        with pytest.raises(ValueError, match="belongs to another teacher"):
            cache_teacher(teacher_of(num_labels=2, hidden_size=16), data, place, worker=(0, 1), **QUICK)
    for worker in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="worker is a number from 0"):
            cache_teacher(teacher_of(), data, tmp_path / "none", worker=worker)
    cache_teacher(teacher_of(), data, tmp_path / "together")
    with pytest.raises(ValueError, match="was not written by workers started apart"):
        cache_teacher(teacher_of(), data, tmp_path / "together", worker=(0, 1))
    manifest = json.loads((tmp_path / "apart" / MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / "apart" / MANIFEST).write_text(json.dumps({**manifest, "is_complete": False}), encoding="utf-8")
    with pytest.raises(ValueError, match="Finish it with worker='env'"):
        cache_teacher(teacher_of(), data, tmp_path / "apart")
    with pytest.raises(ValueError, match="nowhere://bucket/cache cannot be used: Protocol not known: nowhere"):
        cache_teacher(teacher_of(), data, "nowhere://bucket/cache")
    with pytest.raises(ValueError, match="The dataset is empty"):
        cache_teacher(teacher_of(), data.to_iterable_dataset().filter(lambda row: False), tmp_path / "empty")

    def forbidden(*args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", forbidden)
    with pytest.raises(ValueError, match=r"memory://bucket/cache cannot be used: Access Denied\. Look at the address"):
        cache_teacher(teacher_of(), data, "memory://bucket/cache")

    def without_bucket(*args, **kwargs):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", without_bucket)
    with pytest.raises(ValueError, match="memory://bucket/cache cannot be used: The specified bucket does not exist"):
        cache_teacher(teacher_of(), data, "memory://bucket/cache", worker=(0, 1))


def test_workers_that_begin_at_the_same_instant_write_one_cache(place, monkeypatch):
    """Both have found none. The manifest is the second one's, and what the first has written meanwhile is known."""
    data, write = rows(11), apart.write_manifest

    def written_over(address, manifest):
        write(address, manifest)
        write(address, {**manifest, "teacher": {**manifest["teacher"], "fingerprint": "0" * 64}})

    with monkeypatch.context() as patched:
        patched.setattr(apart, "write_manifest", written_over)
        with pytest.raises(ValueError, match="belongs to another teacher"):
            cache_teacher(teacher_of(), data, place, worker=(0, 1), **QUICK)
    store = Store(place)
    store.remove(MANIFEST)
    cache_teacher(teacher_of(), data, place, worker=(0, 1), **QUICK)
    manifest, note = (json.loads(store.read(name)) for name in (MANIFEST, "part-000001.json"))
    store.write(MANIFEST, json.dumps({**manifest, "is_complete": False}).encode())
    store.write("part-000001.json", json.dumps({**note, "of": "0" * 16}).encode())
    with pytest.raises(ValueError, match="Part 1 of the cache in .* was written by a worker with another teacher"):
        cache_teacher(teacher_of(), data, place, worker=(0, 1), **QUICK)


def test_a_launcher_says_which_worker_this_is(monkeypatch):
    for names in apart.ENVIRONMENTS:
        for name in names[:2]:
            monkeypatch.delenv(name, raising=False)
    assert worker_here() == (0, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "13")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "10")
    assert worker_here() == (3, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker_here() == (1, 2)
