"""A kill at any moment leaves the old file or folder, or the new one; links are replaced, never followed."""

import os

import pytest

from hf_compress.files import whole
from hf_compress.files.whole import (
    beside,
    discard,
    remove,
    remove_leftovers,
    replace_folder,
    whole_folder,
    write_whole,
)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """The process ends before its `number`-th change of the disk's names: nothing after it is done."""
    done = iter(range(number))

    def ends(original):
        def call(*args, **kwargs):
            if next(done, None) is None:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in ((whole.Path, "rename"), (whole.Path, "replace"), (whole.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, ends(getattr(owner, name)))


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "größer")
    write_whole(file, "zwei")
    assert file.read_bytes() == b"zwei" and list(tmp_path.iterdir()) == [file]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with pytest.raises(RuntimeError), beside(file) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", range(4))
def test_a_kill_while_a_folder_is_replaced_leaves_one_of_both(number, tmp_path, monkeypatch):
    for name in ("model", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(name.encode())
    with monkeypatch.context() as patched:
        kill_at(patched, number)
        try:
            replace_folder(tmp_path / "new", tmp_path / "model")
        except Killed:
            assert number < 3, "three changes: the old one aside, the new one in, the old one gone"
    remove_leftovers(tmp_path)
    assert (tmp_path / "model" / "weights").read_bytes() == (b"model" if number < 2 else b"new")
    assert not list(tmp_path.glob(".*"))


def test_links_are_taken_away_and_what_they_lead_to_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_bytes(b"mine")
    for act in (remove, discard, lambda link: replace_folder(tmp_path / "new", link)):
        link = tmp_path / "link"
        link.symlink_to("mine")
        (tmp_path / "new").mkdir(exist_ok=True)
        act(link)
        assert not link.is_symlink() and (tmp_path / "mine" / "notes").read_bytes() == b"mine"
    (tmp_path / "file").symlink_to("mine/notes")
    write_whole(tmp_path / "file", "ours")
    assert (tmp_path / "mine" / "notes").read_bytes() == b"mine" and (tmp_path / "file").read_bytes() == b"ours"


def test_leftovers_of_a_killed_writer_go(tmp_path):
    (tmp_path / f".a.json.{os.getpid()}{whole.WRITING}").write_bytes(b"half")
    (tmp_path / f".model{whole.WRITING}").mkdir()
    (tmp_path / ".hidden").write_bytes(b"mine")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("number", range(3))
def test_a_kill_while_a_folder_is_made_leaves_none_or_all_of_it(number, is_there, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    if is_there:
        folder.mkdir()

    def make():
        with whole_folder(folder) as new:
            (new / "a").write_bytes(b"1")
            (new / "b").write_bytes(b"2")

    with monkeypatch.context() as patched:
        kill_at(patched, number)
        patched.setattr(whole, "remove", lambda path: None)  # nor does a `finally` run
        patched.setattr(whole.FileLock, "release", lambda lock, force=False: None)
        try:
            make()
        except Killed:
            assert not folder.exists() or not any(folder.iterdir())
    if not folder.exists() or not any(folder.iterdir()):
        make()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(ValueError, match="out is not empty"):
        make()


def test_one_process_makes_a_folder_at_a_time(tmp_path):
    with whole_folder(tmp_path / "out") as new:
        (new / "a").write_bytes(b"1")
        with pytest.raises(ValueError, match="Another process writes .*out"), whole_folder(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_the_folder_one_stands_in_is_not_taken_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be replaced by a folder that is whole"), whole_folder(tmp_path):
        pass


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "out").symlink_to("big disk")
    with whole_folder(tmp_path / "out") as new:
        (new / "a").write_bytes(b"1")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big disk" / "a").read_bytes() == b"1"
