"""What a person reads while a command runs: a line before each stage, one after it, and nothing of libraries."""

import json
import re

import pytest
import yaml
from recipe_run import QUICK, TRAIN, reviews, tiny_folder

from hf_compress.commands import main as command
from hf_compress.commands.main import leave, main
from hf_compress.recipe.store import Store
from hf_compress.recipe.training import Change
from hf_compress.version import __version__

CHATTER = re.compile(r"\{|it/s|examples/s|shards|Loading|Warning|\[transformers\]|LOAD REPORT")
TUNE = {**TRAIN, "disable_tqdm": False, "logging_steps": 2}
STAGES = [{"fine-tune": TUNE}, {"prune": {"method": "vocabulary"}}, {"quantize": {"bits": 8}}, {"evaluate": QUICK}]


@pytest.fixture
def words(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": STAGES}), encoding="utf-8")
    model, texts = tiny_folder(tmp_path / "model", num_labels=3), reviews(tmp_path / "r.csv")
    return ["run", str(tmp_path / "mine.yaml"), "--model", str(model), "--data", str(texts),
            "--output", str(tmp_path / "out"), "--max-length", "16"]  # fmt: skip


def test_a_run_is_told_in_two_lines_a_stage(words, capfd, caplog):
    """A new head on the model, a training with checkpoints, texts that are read: all that libraries remark on."""
    assert main(words) == 0
    shown = capfd.readouterr()
    assert not CHATTER.search(shown.err + shown.out), shown
    told = [record.message for record in caplog.records if not record.message.startswith("data: ")]
    begun = [line for line in told if not line.startswith(" ")]
    assert begun == ["1/4 fine-tune, 42 train texts", "2/4 vocabulary: prune by vocabulary", "3/4 rtn: quantize by rtn",
                     "4/4 evaluate, 12 test texts"]  # fmt: skip
    after = [told[told.index(two) - 1] for two in begun[1:]] + [told[-1]]
    assert re.fullmatch(r"    \d+\.\d% accuracy on 6 validation texts, loss [\d.]+, [\d.]+ kB, \d+ s", after[0])
    assert all(re.fullmatch(r"    [\d.]+ kB, \d+ s", line) for line in after[1:3])
    assert re.search(r"x smaller, .* for one text, .* points of accuracy \(.* to .*\), 12 examples, \d+ s$", after[3])
    caplog.clear()
    assert main([*words, "--set", "rtn.bits=4"]) == 0
    assert "1/4 fine-tune: kept from an earlier run" in caplog.text
    assert re.search("3/4 rtn: .*, [0-9]+ s last time", caplog.text)


def test_the_time_of_a_stage_is_not_that_of_one_whose_name_begins_alike(tmp_path):
    for folder, seconds in (("student", 300.0), ("student-8-bit", 2.0)):
        record = tmp_path / "stages" / f"01-{folder}-{16 * 'a'}" / "stage.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"name": folder, "seconds": seconds, "files": {}}), encoding="utf-8")
    assert Store(tmp_path).seconds_before("student") == 300.0


def test_verbose_brings_back_what_libraries_tell(words, capfd):
    assert main([*words, "--verbose"]) == 0
    assert CHATTER.search(capfd.readouterr().err)


def test_ctrl_c_is_one_line_and_says_how_to_go_on(words, capfd, monkeypatch):
    def interrupted(stage, work):
        raise KeyboardInterrupt

    monkeypatch.setattr(Change, "run", interrupted)
    assert main(words) == command.INTERRUPTED == 130
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == "hf-compress: Interrupted. Run the same command again to go on: what is finished is kept."
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("code, at_once", [(0, False), (2, False), (130, True)])
def test_only_an_interrupted_process_does_not_wait_for_its_threads(code, at_once, monkeypatch):
    ended = []
    monkeypatch.setattr(command.os, "_exit", ended.append)
    with pytest.raises(SystemExit) as stop:
        leave(code)
    assert ended == [code] * at_once and stop.value.code == code


SAID_AT_ONCE = {"--version": f"hf_compress {__version__}\n", "": "hf-compress VERB", "help": "hf-compress VERB"}


@pytest.mark.parametrize("word, start", SAID_AT_ONCE.items(), ids=["version", "nothing", "help"])
def test_what_needs_no_work_is_said_at_once(word, start, capsys):
    assert main(word.split()) == 0 and capsys.readouterr().out.startswith(start)


def test_help_names_the_exit_codes(capsys):
    main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "0; 2 for what you can mend (options, files, data, rights); 1 for what failed; 3 for a" in shown
    assert "130 for Ctrl-C" in shown
