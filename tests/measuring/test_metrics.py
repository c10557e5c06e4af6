"""Each task's usual metric, against values worked out by hand and the libraries that the field counts with."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from torch.nn.functional import one_hot

import hf_compress as hfc
from hf_compress.measuring.answers import best_answers
from hf_compress.measuring.entities import answer_scores, entities
from hf_compress.measuring.metrics import counts_f1, metric_for, pearson, spearman
from hf_compress.measuring.quality import example_scores, usable_rows
from hf_compress.measuring.significance import randomization_p_value
from hf_compress.model.reading import IGNORED, PaddingCollator
from hf_compress.report.differences import difference_of

QUICK = dict(sequence_length=8, latency_rounds=3, throughput_rounds=3)
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def named(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def kept(model, outputs, batch, rows=()):
    metric = metric_for(model, rows)
    return metric, metric.keep(SimpleNamespace(**outputs), batch, rows).double()


@pytest.mark.parametrize("tags, found", [  # of seqeval.metrics.sequence_labeling.get_entities
    ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
    ("I-PER I-PER B-PER", {("PER", 0, 1), ("PER", 2, 2)}),  # an entity begins without its B
    ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),  # and where the type changes
    ("S-LOC E-LOC E-LOC", {("LOC", 0, 0), ("LOC", 1, 1), ("LOC", 2, 2)}),
    ("B-PER E-PER I-PER O", {("PER", 0, 1), ("PER", 2, 2)}),
    ("O B-a-b I-a-b", {("a-b", 1, 2)}),
    ("O O", set()),
    ("", set()),
])  # fmt: skip
def test_entities_are_those_that_seqeval_finds(tags, found):
    assert entities(tags.split()) == found


def test_entity_f1_by_hand():
    model = tiny_model("bert", "tokens", **named(*TAGS))
    true = torch.tensor([[1, 2, 0, 3, IGNORED], [0, 3, 4, 0, 1]])  # PER, LOC; LOC, PER
    given = torch.tensor([[1, 2, 0, 0, 3], [0, 3, 0, 0, 1]])  # PER; a shorter LOC, PER
    metric, counts = kept(model, {"logits": one_hot(given, 5).float()}, {"labels": true})
    assert metric.name == "entity F1"
    assert counts.tolist() == [[1, 1, 2], [1, 2, 2]]  # right, given, true
    assert metric.total(counts).item() == pytest.approx(2 * 2 / (3 + 4))


def test_tags_that_are_no_entities_are_counted_one_by_one():
    model = tiny_model("bert", "tokens", **named("NOUN", "VERB"))
    batch = {"labels": torch.tensor([[0, 1, IGNORED], [1, 1, 1]])}
    metric, counts = kept(model, {"logits": one_hot(torch.tensor([[0, 0, 0], [1, 1, 0]]), 2).float()}, batch)
    assert (metric.name, metric.total(counts).item()) == ("token accuracy", 3 / 5)


@pytest.mark.parametrize("given, answers, exact, f1", [  # of SQuAD's evaluate-v2.0.py
    ("The Eiffel Tower!", ["Eiffel tower", "a tower"], 1, 1),
    ("Eiffel tower of Paris", ["the Eiffel tower"], 0, 2 * 2 / (4 + 2)),
    ("in 1889", ["1889", "the year 1890"], 0, 2 * 1 / (2 + 1)),
    ("to to be", ["to be"], 0, 2 * 2 / (3 + 2)),  # words count as often as they stand there
    ("", [], 1, 1), ("Paris", [], 0, 0), ("", ["Paris"], 0, 0), ("the", ["a"], 1, 1),
], ids=str)  # fmt: skip
def test_answers_are_scored_as_squad_does(given, answers, exact, f1):
    assert answer_scores(given, answers) == (exact, pytest.approx(f1))


def test_an_answer_is_the_likeliest_span_of_the_context():
    row = {"context": "it was 1889", "offset_mapping": [None, None, [0, 2], [3, 6], [7, 11], None]}
    start = torch.tensor([[9.0, 8.0, 0.0, 1.0, 5.0, 0.0]])
    end = torch.tensor([[0.5, 0.0, 7.0, 2.0, 6.0, 9.0]])  # the end before its start, and those outside, are no answers
    outputs = SimpleNamespace(start_logits=start, end_logits=end)
    batch = {"attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert best_answers(outputs, batch, [row], may_be_none=False) == ["1889"]
    assert best_answers(outputs, batch, [row], may_be_none=True) == ["1889"]  # 5 + 6 against 9 + 0.5
    start[0, 0] = 12
    assert best_answers(outputs, batch, [row], may_be_none=True) == [""]
    padded = SimpleNamespace(start_logits=torch.cat([torch.full((1, 2), 20.0), start], 1),
                             end_logits=torch.cat([torch.full((1, 2), 20.0), end], 1))  # fmt: skip
    mask = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])}  # padded on the left
    assert best_answers(padded, mask, [row], may_be_none=False) == ["1889"]


def test_labels_of_one_text_have_an_f1_each():
    model = tiny_model("bert", problem_type="multi_label_classification", **named("a", "b", "c"))
    logits = torch.tensor([[2.0, -1.0, -1.0], [1.0, 3.0, -2.0], [-1.0, 1.0, -1.0]])
    true = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    metric, counts = kept(model, {"logits": logits}, {"labels": true})
    by_hand = {"F1 of a": 2 * 2 / (2 + 3), "F1 of b": 2 * 1 / (2 + 2), "F1 of c": 0.0}
    assert metric.further(counts[None]) == pytest.approx(by_hand)
    assert metric.total(counts).item() == pytest.approx(sum(by_hand.values()) / 3)


def test_classes_have_accuracy_and_macro_f1():
    model = tiny_model("bert", num_labels=4)
    given, true = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 1])
    metric, counts = kept(model, {"logits": one_hot(given, 4).float()}, {"labels": true})
    assert metric.total(counts).item() == pytest.approx(3 / 5)
    f1 = [2 * 1 / (1 + 2), 2 * 1 / (2 + 2), 2 * 1 / (2 + 1)]  # class 3 is neither there nor given
    assert metric.further(counts[None]) == {"macro F1": pytest.approx(sum(f1) / 3)}


def test_correlations_by_hand():
    values = torch.tensor([[1.0, 1.0], [2.0, 4.0], [3.0, 9.0]]).double()
    assert pearson(values).item() == pytest.approx(8 / math.sqrt(2 * 98 / 3))  # means 2 and 14 / 3
    assert spearman(values).item() == pytest.approx(1.0)
    ties = torch.tensor([[1.0, 1.0], [1.0, 2.0], [3.0, 3.0]]).double()  # ranks 1.5, 1.5, 3 and 1, 2, 3
    assert spearman(ties).item() == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert pearson(torch.ones(3, 2).double()).item() == 0


def test_correlations_and_f1_are_those_of_the_libraries():
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (50, 2), generator=draw).double()  # many ties
    assert pearson(values).item() == pytest.approx(stats.pearsonr(*values.T.numpy())[0])
    assert spearman(values).item() == pytest.approx(stats.spearmanr(*values.T.numpy())[0])
    model = tiny_model("bert", num_labels=6)
    given, true = values.long().unbind(-1)
    metric, counts = kept(model, {"logits": one_hot(given, 6).float()}, {"labels": true})
    expected = metrics.f1_score(true, given, average="macro")
    assert metric.further(counts[None])["macro F1"] == pytest.approx(expected)


@pytest.mark.parametrize("family, task", [("gpt2", "clm"), ("bert", "mlm"), ("bart", "seq2seq")])
def test_perplexity_is_that_of_the_tokens_that_have_a_label(family, task):
    model = tiny_model(family, task)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, 7, 8]}, {"input_ids": [9, 10], "labels": [IGNORED, 10]}]
    collator = PaddingCollator(SimpleNamespace(pad_token_id=0, pad_token_type_id=0, padding_side="right"))
    metric = metric_for(model, rows)
    counts = example_scores(model, usable_rows(rows, model), collator, metric=metric, batch_size=2)
    assert counts[:, 1].tolist() == [3, 1]
    total = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        total += model(ids, labels=labels).loss.item() * (labels != IGNORED).sum().item()
    assert metric.further(counts[None])["perplexity"] == pytest.approx(math.exp(total / 4), rel=1e-5)  # float32


TASKS = {
    "tokens": (named(*TAGS), {"labels": [0, 1, 2, 0]}, "entity F1"),
    "answers": ({}, {"answers": {"text": ["b c"]}, "context": "b c d",
                     "offset_mapping": [None, [0, 1], [2, 3], [4, 5]]}, "answer F1"),
    "several": ({"problem_type": "multi_label_classification", **named("a", "b")}, {"labels": [1.0, 0.0]}, "macro F1"),
    "score": ({"problem_type": "regression", "num_labels": 1}, {"labels": 0.5}, "Pearson correlation"),
    "mlm": ({}, {"labels": [5, 6, 7, 8]}, "log-likelihood per token"),
    "classification": (named("a", "b"), {"labels": 1}, "accuracy"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_models_of_every_task_are_compared(task):
    changes, label, name = TASKS[task]
    head = task if task in ("tokens", "answers", "mlm") else "classification"
    model, other = (tiny_model("bert", head, seed=seed, **changes) for seed in (0, 1))
    rows = [{"input_ids": [5 + i, 6, 7, 8], **label} for i in range(20)]
    if task == "score":
        rows = [{**row, "labels": float(i)} for i, row in enumerate(rows)]
    report = hfc.compare({"m": model, "same": model, "seeds": [other, model]}, eval_dataset=rows, **QUICK)
    assert report.metric == name and report.num_examples == 20
    assert report["same"].difference.interval.value == 0 and report["same"].difference.p_value == 1
    assert report["seeds"].seed_qualities[1] == pytest.approx(report["m"].quality)
    for further in report["m"].scores:
        assert further in report.to_markdown() and further in report.to_html() and further in report.table()
    assert type(report).from_json(report.to_json()) == report
    with pytest.raises(ValueError, match=f"{name} needs"):
        hfc.compare({"m": model}, eval_dataset=[{"input_ids": [5, 6]}], **QUICK)


def test_a_difference_of_f1_is_found_and_one_by_chance_is_not():
    draw = torch.Generator().manual_seed(0)
    true = torch.ones(300)
    good, bad = ((torch.rand(300, generator=draw) < share).double() for share in (0.9, 0.7))
    again = good[torch.randperm(300, generator=draw)]
    one, worse, same = (torch.stack([right, true, true], -1)[None] for right in (good, bad, again))
    found = difference_of(one, worse, counts_f1)
    assert found.verdict == "worse" and found.interval.low < found.interval.value < found.interval.high < 0
    assert found.interval.value == pytest.approx((bad.mean() - good.mean()).item())
    assert difference_of(one, same, counts_f1).verdict == "no difference"


def test_the_p_value_of_a_mean_is_that_of_all_swaps():
    reference, candidate = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[2.0, 2, 5, 4.5]])
    both = [one.double()[..., None] for one in (reference, candidate)]
    # of 2^4 swaps of the differences 1, 0, 2, 0.5: their sum is +-3.5 in 4, as large as the one that was seen
    p_value = randomization_p_value(*both, lambda kept: kept[..., 0].mean(-1), resamples=20_000)
    assert p_value == pytest.approx(4 / 16, abs=0.01)  # 3 standard deviations of 20,000 draws
