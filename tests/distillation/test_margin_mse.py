"""Rerankers: the margins' loss, a run over queries and passages, and a folder that CrossEncoder opens."""

import pytest
import torch
from datasets import Dataset
from helpers import tiny_model
from recipe_run import tiny_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from distillation.training import config, random
from hf_compress.distillation.methods.margin_mse import CandidatesCollator, margin_loss

IDENTITY = {"activation_fn": "torch.nn.modules.linear.Identity"}


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path / "words"))


def rerankers(**changes):
    teacher = tiny_model("bert", num_labels=1, seed=3, initializer_range=0.3, **changes)
    return hfc.make_student(teacher, num_hidden_layers=2), teacher


def rows(number=6, negatives=2):
    words = "abcdefghij"
    found = [{"query": f"the {words[i % 10]}", "positive": f"good {words[i % 10]} film",
              "negative": [f"bad {words[(i + j) % 10]} film was not" for j in range(1, negatives + 1)]}
             for i in range(number)]  # fmt: skip
    return Dataset.from_list(found)


def trainer(folder, tokenizer, student, teacher, data=None, **options):
    data = rows() if data is None else data
    args = config(folder, hfc.MarginMSEConfig, **{"max_length": 16, **options})
    return hfc.MarginMSETrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data,
                                processing_class=tokenizer)  # fmt: skip


def by_hand(scores, targets):
    """The equation, number by number: mean over queries and negatives."""
    found = []
    for s, t in zip(scores, targets, strict=True):
        found += [((s[0] - s[j]) - (t[0] - t[j])) ** 2 for j in range(1, len(s))]
    return sum(found) / len(found)


@pytest.mark.parametrize("passages", [2, 5])
def test_the_loss_is_its_equation(passages):
    mine, theirs = random(4, passages), random(4, passages, seed=1)
    assert margin_loss(mine, theirs).item() / 4 == pytest.approx(by_hand(mine.tolist(), theirs.tolist()), rel=1e-12)
    mine.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margin_loss(x, theirs), mine)


def test_a_score_that_all_passages_share_is_free():
    scores = random(3, 4)
    shift = random(3, 1, seed=2)
    assert margin_loss(scores + shift, scores).item() == pytest.approx(0.0, abs=1e-12)


def scores_of(model, tokenizer, data):
    """One pair at a time, in float64."""
    model = model.double().eval()
    with torch.no_grad():
        return [[model(**tokenizer(row["query"], text, return_tensors="pt")).logits.item()
                 for text in (row["positive"], *row["negative"])] for row in data]  # fmt: skip


@pytest.mark.parametrize("batch", [4, 6])  # the last batch is smaller, or there is one
def test_a_run_computes_the_equation_whatever_the_batches(batch, tokenizer, tmp_path):
    student, teacher = rerankers()
    found = trainer(tmp_path, tokenizer, student, teacher, per_device_eval_batch_size=batch).evaluate()
    both = (scores_of(model, tokenizer, rows()) for model in (student, teacher))
    assert [found["eval_margin_loss"], found["eval_loss"]] == pytest.approx([by_hand(*both)] * 2, rel=1e-4)


def test_training_brings_the_margins_nearer_and_cut_steps_are_the_same_step(tokenizer, tmp_path):
    losses = []
    for accumulation in (1, 3):
        student, teacher = rerankers(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        run = trainer(tmp_path, tokenizer, student, teacher, max_steps=8, per_device_train_batch_size=6 // accumulation,
                      gradient_accumulation_steps=accumulation)  # fmt: skip
        before = run.evaluate()["eval_loss"]
        run.train()
        losses.append(run.evaluate()["eval_loss"])
        assert losses[-1] < before
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam takes small differences of float32 along


@pytest.mark.parametrize("activation", [None, IDENTITY], ids=["sigmoid", "identity"])
def test_the_folder_opens_in_cross_encoder_and_scores_as_its_teacher_does(activation, tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    student, teacher = rerankers()
    student = AutoModelForSequenceClassification.from_pretrained(saved(student, tmp_path / "own"))
    if activation:
        teacher.config.sentence_transformers = activation
    run = trainer(tmp_path / "run", tokenizer, student, teacher)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    pairs = [(row["query"], row["positive"]) for row in rows()]
    found = library.CrossEncoder(str(tmp_path / "saved"), device="cpu").predict(pairs, convert_to_tensor=True)
    scores = torch.tensor([one[0] for one in scores_of(run.model, tokenizer, rows())])
    expected = scores if activation else scores.sigmoid()
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=1e-4, atol=1e-5)  # float32 of the library


def test_a_packed_and_pruned_reranker_opens_in_cross_encoder(tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    student, _ = rerankers()
    hfc.prune_heads(student, {0: [0]})
    saved(hfc.quantize(student, bits=8), tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    found = library.CrossEncoder(str(tmp_path / "packed"), device="cpu").predict([("the a", "good a film")])
    with torch.no_grad():
        expected = student.eval()(**tokenizer("the a", "good a film", return_tensors="pt")).logits.sigmoid()
    assert found[0] == pytest.approx(expected.item(), abs=1e-5)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_one_negative_may_be_a_text(tokenizer):
    data = [{"query": "the a", "positive": "good", "negative": "bad film"}]
    batch = CandidatesCollator(tokenizer, 16)(data)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert texts == ["the a good", "the a bad film"] and batch["candidates"].tolist() == [2, 2]


def test_what_is_no_reranking_is_refused_before_training(tokenizer, tmp_path):
    student, teacher = rerankers()
    with pytest.raises(ValueError, match="needs the columns .* \\['negative'\\] are not among"):
        trainer(tmp_path, tokenizer, student, teacher, rows().remove_columns("negative"))
    uneven = Dataset.from_list([{**rows(1)[0]}, {**rows(1, 1)[0]}])
    with pytest.raises(ValueError, match="as many negatives, but they have 1 and 2"):
        trainer(tmp_path, tokenizer, student, teacher, uneven)
    with pytest.raises(ValueError, match="one score for a query and a passage, but the student is .* with 2 labels"):
        two = tiny_model("bert", num_labels=2, seed=3)
        trainer(tmp_path, tokenizer, hfc.make_student(two, num_hidden_layers=1), two)
    with pytest.raises(ValueError, match="the student reads 64 tokens at most"):
        trainer(tmp_path, tokenizer, student, teacher, max_length=128)
    with pytest.raises(ValueError, match="alpha stays 1"):
        hfc.MarginMSEConfig(str(tmp_path), alpha=0.5)
    with pytest.raises(ValueError, match="give processing_class="):
        trainer(tmp_path, None, student, teacher)
