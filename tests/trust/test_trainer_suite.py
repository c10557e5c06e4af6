"""The harness that runs Transformers' tests of Trainer with ours in its place, on tests like these."""

import pytest

from scripts.checks.trainer_suite import OURS, STOCK, failures, outcomes_of, run, told

TESTS = """
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, input_x, labels=None):
        y = self.a * input_x
        return (y,) if labels is None else (((y - labels) ** 2).mean(), y)


def bert():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    return BertForSequenceClassification(config)


def rows(number=8):
    return [{"input_ids": torch.tensor([i % 20, 1]), "labels": i % 2} for i in range(number)]


def args(folder, **more):
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", max_steps=2, disable_tqdm=True, **more)


def test_a_classifier_trains_and_logs(tmp_path):
    trainer = Trainer(bert(), args(tmp_path, logging_steps=1), train_dataset=rows())
    trainer.train()
    assert trainer.state.global_step == 2 and "loss" in trainer.state.log_history[0]


def test_a_model_of_ones_own(tmp_path):
    data = [{"input_x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(8)]
    Trainer(Own(), args(tmp_path), train_dataset=data).train()


def test_a_mistake_stays_one(tmp_path):
    Trainer(bert(), args(tmp_path), train_dataset=None).train()


def test_what_only_a_stock_trainer_has(tmp_path):
    assert type(Trainer(bert(), args(tmp_path), train_dataset=rows())).__mro__[1] is object
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite") / "tests" / "trainer"
    folder.mkdir(parents=True)
    (folder / "test_trainer.py").write_text(TESTS, encoding="utf-8")
    return folder / "test_trainer.py"


@pytest.mark.long
@pytest.mark.parametrize("name", OURS)
def test_a_trainer_of_ours_stands_in_the_place_of_trainer(name, suite):
    found = run(suite, name, suite.parents[1], 300)
    assert found == {
        "test_trainer::test_a_classifier_trains_and_logs": "passed",
        "test_trainer::test_a_model_of_ones_own": "passed" if name == "DistillationTrainer" else "refused",
        "test_trainer::test_a_mistake_stays_one": "failed",
        "test_trainer::test_what_only_a_stock_trainer_has": "failed",
    }


def test_what_the_stock_trainer_fails_is_not_held_against_ours():
    stock = {"a": "passed", "b": "failed", "c": "skipped", "d": "passed", "e": "passed"}
    ours = {"a": "passed", "b": "failed", "c": "skipped", "d": "refused", "e": "failed", "f": "failed"}
    assert failures(stock, ours) == ["e", "f"] and failures(stock, {}) == ["a", "d", "e"]
    assert told({STOCK: stock, "QBertTrainer": {**ours, "f": "passed"}}) == [
        "Trainer: 3 pass, 1 fail here, 1 skipped", "    b", "QBertTrainer: 1 of 2 pass; 1 do not apply", "    e",
        "    (refused) d",
    ]  # fmt: skip


def test_a_file_that_does_not_run_is_a_failure(suite, tmp_path):
    (tmp_path / "trainer").mkdir()
    file = tmp_path / "trainer" / "test_torn.py"
    file.write_text("import nothing_of_this_name", encoding="utf-8")
    assert "failed" in run(file, STOCK, tmp_path, 100).values()


def test_reports_are_read(tmp_path):
    text = (
        '<testsuites><testsuite><testcase classname="t.C" name="a"/>'
        '<testcase classname="t.C" name="b"><skipped/></testcase>'
        '<testcase classname="t.C" name="c"><failure message="NotApplicable: x">NotApplicable</failure></testcase>'
        '<testcase classname="t.C" name="d"><error message="boom">KeyError</error></testcase></testsuite></testsuites>'
    )
    (tmp_path / "report.xml").write_text(text, encoding="utf-8")
    assert outcomes_of(tmp_path / "report.xml") == {
        "C::a": "passed", "C::b": "skipped", "C::c": "refused", "C::d": "failed"
    }  # fmt: skip
