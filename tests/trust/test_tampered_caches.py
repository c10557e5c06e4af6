"""A teacher cache that was cut, altered, or made by a stranger ends in a sentence; nothing outside it is touched."""

import copy
import hashlib
import json
import re

import pytest
import torch
from distillation.data import rows
from helpers import tiny_model
from safetensors.torch import load_file, save, save_file

from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.cache_files import MANIFEST
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.shards import Shards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    cache_teacher(tiny_model("bert", seed=3), rows(12), folder, hidden_states=(1,), shard_size=6)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def cache(made, tmp_path):
    (tmp_path / "cache").mkdir()
    for name, content in made.items():
        (tmp_path / "cache" / name).write_bytes(content)
    return tmp_path / "cache"


def manifest_of(cache):
    return json.loads((cache / MANIFEST).read_text(encoding="utf-8"))


def write(cache, manifest):
    (cache / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


ODD = (None, True, -1, 1.5, "../x", "", [], {}, [1], ["x"], {"a": 1}, 10**30)


def places(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_a_manifest_with_any_entry_odd_or_gone_loads_as_it_was_or_is_refused_in_a_sentence(cache):
    whole = manifest_of(cache)
    names = [path for path in places(whole) if path[:2] != ("teacher", "config")]
    refused = 0
    for path in [*names, ("teacher", "config")]:
        for value in (*ODD, "gone"):
            manifest = copy.deepcopy(whole)
            holder = manifest
            for key in path[:-1]:
                holder = holder[key]
            if value == "gone":
                del holder[path[-1]]
            else:
                holder[path[-1]] = value
            write(cache, manifest)
            try:
                assert len(CachedTeacher(cache)) == 12
            except ValueError as error:
                assert str(cache) in str(error) or "damaged" in str(error)
                refused += 1
    assert refused > 10 * len(names) // 2


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x", "shard-0123456789abcdef.safetensors/../../x", "x", ""])
def test_a_shard_is_a_file_of_the_cache(name, cache):
    (cache.parent / "x.safetensors").write_bytes(b"mine")
    manifest = manifest_of(cache)
    entry = {"size_bytes": 4, "sha256": hashlib.sha256(b"other").hexdigest(), "examples": 1}
    write(cache, {**manifest, "shards": {**manifest["shards"], name: entry}})
    for act in (lambda: CachedTeacher(cache), lambda: cache_teacher(tiny_model("bert", seed=3), rows(12), cache,
                                                                    hidden_states=(1,))):  # fmt: skip
        with pytest.raises(ValueError, match="is damaged: shards is"):
            act()
    assert (cache.parent / "x.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"version": 1}', "{", "null"])
def test_what_is_no_manifest(text, cache):
    (cache / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(cache / MANIFEST))):
        CachedTeacher(cache)


CHANGES = {
    "keys": lambda t: t.pop("keys"),
    "logits": lambda t: t.pop("logits"),
    "fewer-logits": lambda t: t.update(logits=t["logits"][:-1].clone()),
    "lengths": lambda t: t.pop("input_lengths"),
    "longer-lengths": lambda t: t.update(input_lengths=t["input_lengths"] + 1),
    "scalar": lambda t: t.update(keys=torch.tensor(1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_shard_that_was_made_anew_with_its_hash_still_has_to_fit(change, cache):
    manifest = manifest_of(cache)
    name = next(iter(manifest["shards"]))
    tensors = load_file(cache / name)
    change(tensors)
    data = save(tensors)
    (cache / name).write_bytes(data)
    manifest["shards"][name] |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write(cache, manifest)
    with pytest.raises(ValueError, match="lacks|it is damaged"):
        CachedTeacher(cache)


def test_a_shard_without_a_whole_file_of_its_kind(cache):
    manifest = manifest_of(cache)
    name = next(iter(manifest["shards"]))
    (cache / name).write_bytes(b"no")
    manifest["shards"][name] |= {"size_bytes": 2, "sha256": hashlib.sha256(b"no").hexdigest()}
    write(cache, manifest)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        CachedTeacher(cache)


def test_torn_notes_of_a_killed_run_are_passed_over(cache, caplog):
    manifest = manifest_of(cache)
    name = next(iter(manifest["shards"]))
    write(cache, {**manifest, "is_complete": False, "shards": {}})
    (cache / f"{name}.json").write_text("{", encoding="utf-8")
    save_file({"x": torch.ones(1)}, cache / "shard-x.safetensors")
    (cache / "shard-x.safetensors.json").write_text("[]", encoding="utf-8")
    cached = cache_teacher(tiny_model("bert", seed=3), rows(12), cache, hidden_states=(1,))
    assert len(cached) == 12 and caplog.text.count("is no note of a shard") >= 2


def test_another_class_than_a_model_is_not_called(cache):
    manifest = manifest_of(cache)
    for name in ("pipeline", "AutoModel", "Trainer", "nothing"):
        manifest["teacher"]["class"] = name
        write(cache, manifest)
        assert CachedTeacher(cache).architecture is None


def test_an_altered_part_of_a_made_dataset_is_written_again(tmp_path, caplog):
    shards = Shards(tmp_path / "made", {"a": 1}, num_rows=4, rows_per_shard=2)
    for number in shards.missing:
        shards.write(number, rows(2).select_columns(["input_ids"]))
    assert shards.missing == [] and len(shards.load()) == 4
    file = shards.file(1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))
    (tmp_path / "made" / ".part-00001.arrow.1.writing").write_bytes(b"half")
    again = Shards(tmp_path / "made", {"a": 1}, num_rows=4, rows_per_shard=2)
    assert again.missing == [1] and "it was altered" in caplog.text
    assert not list(tmp_path.glob("made/.*.writing"))
    (tmp_path / "made" / "settings.json").write_text("[", encoding="utf-8")
    again._lock.release()
    with pytest.raises(ValueError, match="settings.json cannot be read"):
        Shards(tmp_path / "made", {"a": 1}, num_rows=4, rows_per_shard=2)
