"""A score over size is the survey's: the mean of the tasks that have a score, over millions of parameters."""

import pytest

from hf_compress.report.score import score_over_size, task_scores


def test_by_hand_of_the_surveys_table():
    """BERT-base of table 4: a mean of tasks over 109 M; one task more changes the mean, not the size."""
    assert score_over_size([84.6, 93.5, 90.5, 88.9], 109e6) == pytest.approx((84.6 + 93.5 + 90.5 + 88.9) / 4 / 109)
    assert score_over_size([80.0], 10e6) == 8.0 and score_over_size([80.0, 60.0], 10e6) == 7.0


def test_of_each_task_the_first_score_that_is_there():
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.1, "f1": 0.9}, "b": {"f1": 0.25}, "c": {"perplexity": 12.0}}
    assert task_scores(tasks) == [50.0, 25.0]


@pytest.mark.parametrize("scores, parameters", [([], 1e6), ([float("nan")], 1e6), ([1.0], 0)],
                         ids=["none", "nan", "no-parameters"])  # fmt: skip
def test_what_has_no_score_or_no_size_is_refused(scores, parameters):
    with pytest.raises(ValueError, match="score_over_size"):
        score_over_size(scores, parameters)
