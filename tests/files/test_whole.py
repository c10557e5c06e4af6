"""A kill at any moment leaves the old file or folder, or the new one; links are replaced, never followed."""

import os

import pytest

from hf_compress.files import whole
from hf_compress.files.whole import beside, discard, remove, remove_leftovers, replace_folder, write_whole


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
