"""A person sees one bar, a loss now and then and no chatter of libraries; everything is as it was afterwards."""

import logging
import re
import sys
import warnings

import pytest
from helpers import tiny_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_compress.training.bar import with_own_bar
from hf_compress.training.progress import our_bars_alone, progress_bar, quiet


def watch(monkeypatch):
    """Standard error, as it is captured in this test, as a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def chatter():
    """What libraries say: a bar and two warnings."""
    list(transformers_logging.tqdm(range(3), desc="Writing model shards"))
    transformers_logging.get_logger("transformers.modeling_utils").warning("newly initialized")
    warnings.warn("deprecated", UserWarning, stacklevel=1)


def test_libraries_are_heard_before_and_after_and_not_within(monkeypatch, capsys):
    watch(monkeypatch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chatter()
        loud = capsys.readouterr().err
        with quiet():
            chatter()
            list(progress_bar(range(3), desc="Ours"))
        within = capsys.readouterr().err
        assert len(told) == 1
        chatter()
    assert "Writing model shards" in loud and "Writing" not in within and "Ours" in within and "newly" not in within
    assert "Writing model shards" in capsys.readouterr().err and len(told) == 2


def test_who_asked_for_all_of_it_gets_it(monkeypatch, capsys):
    watch(monkeypatch)
    with quiet(enabled=False), pytest.warns(UserWarning, match="deprecated"):
        chatter()
    assert "Writing model shards" in capsys.readouterr().err


def test_levels_come_back_after_an_error():
    before = transformers_logging.get_verbosity(), logging.getLogger("accelerate").level
    with pytest.raises(ZeroDivisionError), quiet():
        assert logging.getLogger("accelerate").level == logging.ERROR
        raise ZeroDivisionError
    assert (transformers_logging.get_verbosity(), logging.getLogger("accelerate").level) == before
    assert transformers_logging.is_progress_bar_enabled()


def test_who_turned_bars_off_sees_none(monkeypatch, capsys):
    watch(monkeypatch)
    transformers_logging.disable_progress_bar()
    try:
        with our_bars_alone():
            assert list(progress_bar(range(3), desc="Ours")) == [0, 1, 2]
    finally:
        transformers_logging.enable_progress_bar()
    assert "Ours" not in capsys.readouterr().err


def test_a_file_gets_no_bar(capsys):
    assert list(progress_bar(range(3), desc="Ours")) == [0, 1, 2] and capsys.readouterr().err == ""


@pytest.mark.parametrize("watched, hidden", [(True, False), (False, False), (True, True)],
                         ids=["terminal", "file", "disabled"])  # fmt: skip
def test_a_training_shows_a_bar_or_a_few_lines_and_no_dictionaries(
    watched, hidden, tmp_path, monkeypatch, capsys, caplog
):
    if watched:
        watch(monkeypatch)
    args = TrainingArguments(str(tmp_path), max_steps=20, logging_steps=1, save_strategy="no", report_to="none",
                             use_cpu=True, per_device_train_batch_size=2, disable_tqdm=hidden)  # fmt: skip
    rows = [{"input_ids": [5, 6, 7], "labels": i % 2} for i in range(4)]
    trainer = with_own_bar(Trainer(tiny_model("bert", num_labels=2), args, train_dataset=rows), "student")
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        trainer.train()
    shown, lines = capsys.readouterr(), [record.message for record in caplog.records if "step" in record.message]
    assert "{" not in shown.out + shown.err
    assert ("student" in shown.err and "loss=" in shown.err) == (watched and not hidden)
    assert [int(re.search(r"step (\d+) of 20: loss", line)[1]) for line in lines] == (
        [] if watched else [5, 10, 15, 20]
    )
    assert trainer.state.log_history, "what is not shown is kept"
