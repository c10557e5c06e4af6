"""A name that a file gives is the name of a file beside it, or it is refused."""

import pytest

from hf_compress.files.inside import inside

OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "..", "", ".", "C:\\x", "\\\\server\\x", "a\\..\\..\\x", "c:x", "a\0b",
           "a\nb", None, 3, ["x"]]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_that_lead_out_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="is no name of a file in this folder"):
        inside(tmp_path, name)


def test_names_inside_are_taken(tmp_path):
    assert inside(tmp_path, "model-00001-of-00002.safetensors") == tmp_path / "model-00001-of-00002.safetensors"
    assert inside(tmp_path, "model/config.json") == tmp_path / "model" / "config.json"


def test_links_that_lead_out_are_refused_and_those_within_followed(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (home / "out").symlink_to(tmp_path / "secret")
    (home / "folder").symlink_to(tmp_path)
    (home / "a").write_bytes(b"a")
    (home / "in").symlink_to("a")
    assert inside(home, "in") == home / "in"
    for name in ("out", "folder/secret"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            inside(home, name)


def test_a_snapshot_of_the_hub_refers_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--me--small" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "77").write_bytes(b"x")
    (snapshot / "config.json").symlink_to("../../blobs/77")
    assert inside(snapshot, "config.json").read_bytes() == b"x"
