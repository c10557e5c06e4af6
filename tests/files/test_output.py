"""What a command writes to is ours alone, or refused with what lies there; nothing of anybody else is ever replaced."""

import json

import pytest

from hf_compress.files.output import LOCK, MANIFEST, Output
from hf_compress.files.whole import beside


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def made(tmp_path):
    model = tmp_path / "source"
    (model / "deep").mkdir(parents=True)
    (model / "config.json").write_bytes(b"{}")
    (model / "deep" / "weights").write_bytes(b"1")
    with Output(tmp_path / "out") as output:
        output.write({"report.md": "one", "recipe.yaml": "a: ä"})
        output.copy(model, "model")
    return tmp_path / "out"


def test_what_is_ours_is_written_again(made, tmp_path):
    (tmp_path / "source" / "deep" / "weights").write_bytes(b"2")
    (tmp_path / "source" / "config.json").unlink()
    with Output(made) as output:
        output.write({"report.md": "two"})
        output.copy(tmp_path / "source", "model")
    assert {n: d for n, d in files(made).items() if n not in (MANIFEST, LOCK)} == {
        "report.md": b"two", "recipe.yaml": "a: ä".encode(), "model/deep/weights": b"2",
    }  # fmt: skip


@pytest.mark.parametrize("there", [["app.py"], ["model/weights", "recipe.yaml"], [".git/config"]], ids=str)
def test_a_folder_of_somebody_else_is_refused_and_stays_as_it_was(there, tmp_path):
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"holds {there[0].split('/')[0]}.*did not write there. Choose another"):
        Output(tmp_path).__enter__()
    assert files(tmp_path) == before


@pytest.mark.parametrize("change", ["report.md", "model/deep/weights", "model/notes.txt", "model"])
def test_what_was_changed_or_added_is_not_replaced(change, made, tmp_path):
    if change == "model":  # now a link to a folder elsewhere
        (made / "model").rename(tmp_path / "elsewhere")
        (made / "model").symlink_to(tmp_path / "elsewhere")
    else:
        (made / change).write_bytes(b"mine")
    before = files(made)
    with Output(made) as output:
        again = (lambda: output.write({"new.md": "x", "report.md": "x"})) if change == "report.md" else (
            lambda: output.copy(tmp_path / "source", "model"))  # fmt: skip
        for act in (again, lambda: output.remove(["recipe.yaml", change])):
            with pytest.raises(ValueError, match=f"{change}.* would be replaced, but hf_compress did not write"):
                act()
    assert files(made) == before


def test_what_others_put_beside_ours_stays(made):
    (made / "notes.txt").write_bytes(b"mine")
    with Output(made) as output:
        output.write({"report.md": "two"})
    assert (made / "notes.txt").read_bytes() == b"mine" and (made / "report.md").read_bytes() == b"two"


def test_one_process_at_a_time(made):
    with Output(made), pytest.raises(ValueError, match="Another process writes to"):
        Output(made).__enter__()
    with Output(made) as output:
        output.write({"report.md": "two"})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": {"a": 3}, "is_alone": true}', '{"files": 3, "is_alone": true}', "{}"]
)
def test_a_manifest_that_cannot_be_read_makes_nothing_ours(text, made):
    (made / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read"):
        Output(made).__enter__()


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_between_manifest_and_file_leaves_old_and_new_known_as_ours(number, made, monkeypatch):
    done = iter(range(number))

    def killed(file):
        if next(done, None) is None:
            raise KeyboardInterrupt
        return beside(file)

    with Output(made) as output:
        with monkeypatch.context() as patched:
            patched.setattr("hf_compress.files.output.beside", killed)
            with pytest.raises(KeyboardInterrupt):
                output.write({"report.md": "two", "report.csv": "two"})
        assert (made / "report.md").read_bytes() == (b"two" if number else b"one")
    with Output(made) as output:
        output.write({"report.md": "three", "report.csv": "three"})
    assert (made / "report.md").read_bytes() == b"three"


def test_a_shared_folder_takes_files_beside_those_of_others(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"mine")
    (tmp_path / "report.csv").write_bytes(b"mine")
    with Output(tmp_path, shared=True) as output:
        output.write({"report.md": "one"})
        with pytest.raises(ValueError, match="report.csv"):
            output.write({"report.md": "two", "report.csv": "two"})
    assert (tmp_path / "report.md").read_bytes() == b"one", "refused before anything is written"
    (tmp_path / ".mine.writing").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds .mine.writing, notes.txt, report.csv, report.md, which"):
        Output(tmp_path).__enter__()
    with Output(tmp_path, shared=True) as output:
        output.write({"report.md": "two"})
    assert (tmp_path / ".mine.writing").is_file()


def test_a_report_among_the_results_of_a_run_leaves_them_ours(made):
    with Output(made, shared=True) as output:
        output.write({"report.csv": "one"})
    with Output(made) as output:
        output.write({"report.csv": "two", "report.md": "two"})


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with Output(tmp_path / "out") as output:
        (tmp_path / "out" / "report").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="report/a.md in .* would be replaced"):
            output.write({"report/a.md": "x"})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_output_may_be_a_link_to_a_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for text in ("one", "two"):
        with Output(tmp_path / "out") as output:
            output.write({"report.md": text})
    assert (tmp_path / "disk" / "report.md").read_bytes() == b"two" and (tmp_path / "out").is_symlink()


def test_the_manifest_names_what_was_written(made):
    names = json.loads((made / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert set(names) == {"report.md", "recipe.yaml", "model/config.json", "model/deep/weights"}
