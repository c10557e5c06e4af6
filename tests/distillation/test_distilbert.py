"""DistilBERT: the triple loss and its gradient, on masked tokens and on task labels."""

import math
from functools import partial

import pytest
import torch
from helpers import tiny_model

from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, padded, pair, random, trainer_of
from hf_compress.distillation.methods.distilbert import DistilBertConfig, DistilBertTrainer, cosine_loss
from hf_compress.distillation.students import make_student


def test_cosine_loss_and_its_gradient_are_their_equation():
    student, teacher = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    expected, gradient = 0.0, torch.zeros(2, 3, 4, dtype=torch.float64)
    for b, t in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        h, g = student[b, t].tolist(), teacher[b, t].tolist()
        norms = [math.sqrt(sum(x * x for x in row)) for row in (h, g)]
        cosine = sum(x * y for x, y in zip(h, g, strict=True)) / norms[0] / norms[1]
        expected += 1 - cosine
        for d in range(4):
            gradient[b, t, d] = cosine * h[d] / norms[0] ** 2 - g[d] / norms[0] / norms[1]
    loss = cosine_loss(student, teacher, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-12)


run = partial(trainer_of, DistilBertTrainer)


def test_masked_language_modelling_sums_the_papers_triple_loss(tmp_path):
    """5 soft + 2 MLM + 1 cosine, all over 7; longer padding changes nothing."""
    student, teacher = (tiny_model("bert", "mlm", seed=seed, initializer_range=0.3) for seed in (1, 2))
    data = rows(4, kind="mlm")
    longer = padded(data).map(lambda r: {"labels": r["labels"] + [-100] * 8})
    metrics = [run(tmp_path, student, teacher, d).evaluate() for d in (data, longer)]
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        mine, theirs = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
    masked, real = inputs["labels"] != -100, inputs["attention_mask"].bool()
    states = [o.hidden_states[-1][real].double() for o in (mine, theirs)]
    cosine = torch.stack([1 - (a @ b) / a.norm() / b.norm() for a, b in zip(*states, strict=True)]).mean()
    q, p = (torch.softmax(o.logits[masked].double() / 2, dim=-1) for o in (mine, theirs))
    soft = 4 * (p * (p / q).log()).sum(dim=-1).mean()
    expected = (5 * soft + 2 * mine.loss + cosine) / 7
    for found in metrics:
        assert found["eval_cosine_loss"] == pytest.approx(cosine.item(), rel=1e-5)
        assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    assert_gradient_is_the_same_however_cut(tmp_path, DistilBertTrainer, "tokens")


def test_in_an_encoder_decoder_the_last_states_are_the_decoders(tmp_path):
    student, teacher = tiny_model("bart", seed=1), tiny_model("bart", seed=2)
    data = rows(4, kind="seq2seq")
    found = run(tmp_path, student, teacher, data).evaluate()
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        states = [m(**inputs, output_hidden_states=True).decoder_hidden_states[-1] for m in (student, teacher)]
    real = inputs["labels"] != -100
    expected = (1 - torch.cosine_similarity(*states, dim=-1))[real].mean()
    assert found["eval_cosine_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_task_data_plain_text_and_narrower_students_train(tmp_path):
    teacher = pair()[1]
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16)
    trainer = run(tmp_path, student, teacher, rows(4).remove_columns("labels"), alpha=1.0, max_steps=1)
    trainer.train()
    assert {"soft_loss", "cosine_loss"} <= trainer.state.log_history[0].keys()
    assert "task_loss" not in trainer.state.log_history[0]
    assert "cosine.weight" in trainer.training_state.state_dict()
    without = run(tmp_path, student, teacher, rows(4), cosine_weight=0.0)
    assert "eval_cosine_loss" not in without.evaluate() and not len(without.training_state)


def test_bad_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cosine_weight must be 0 or more, got -1"):
        DistilBertConfig(str(tmp_path), cosine_weight=-1.0)
