"""Neighbours of a batch, written out example by example."""

import math

import pytest
import torch

import hf_compress as hfc
from distillation.data import rows
from distillation.test_terms import with_terms
from distillation.training import padded, pair, random
from hf_compress.distillation.methods.neighbours import order_loss, probability_loss
from hf_compress.distillation.students import make_student


def cosine(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def divergence(student, teacher):
    """Eq. 3, 4 and 9 of Passalis and Tefas, by loops."""
    total = 0.0
    for i in range(len(student)):
        p, q = ({j: (cosine(x[i], x[j]) + 1) / 2 for j in range(len(x)) if j != i} for x in (teacher, student))
        p, q = ({j: value / sum(d.values()) for j, value in d.items()} for d in (p, q))
        total += sum(p[j] * math.log(p[j] / q[j]) for j in p)
    return total


def hinges(student, teacher, margin):
    B = len(student)
    mean = sum(math.dist(student[i], student[j]) for i in range(B) for j in range(B)) / (B * (B - 1))
    found = [
        max(0.0, (math.dist(student[i], student[a]) - math.dist(student[i], student[b])) / mean + margin)
        for i in range(B) for a in range(B) for b in range(B)
        if len({i, a, b}) == 3 and math.dist(teacher[i], teacher[a]) < math.dist(teacher[i], teacher[b])
    ]  # fmt: skip
    return B * sum(found) / len(found)


def test_the_losses_are_their_equations():
    student, teacher = random(5, 3), random(5, 7, seed=1)
    mine, theirs = student.tolist(), teacher.tolist()
    assert probability_loss(student, teacher).item() == pytest.approx(divergence(mine, theirs), rel=1e-10)
    for margin in (0.0, 0.3):
        found = order_loss(student, teacher, margin).item()
        assert found == pytest.approx(hinges(mine, theirs, margin), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: probability_loss(x, teacher), student.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: order_loss(x, teacher, 0.3), student)


def test_a_student_that_sees_its_teachers_neighbours_has_no_loss_whatever_its_scale():
    x = random(6, 4)
    rotation = torch.linalg.qr(random(4, 4, seed=2)).Q
    assert probability_loss(7 * x @ rotation, x).item() == pytest.approx(0.0, abs=1e-12)
    assert order_loss(7 * x @ rotation + 1, x, 0.0).item() == 0.0
    assert order_loss(-x, x, 0.0).item() == 0.0  # distances are all that counts
    assert order_loss(random(6, 4, seed=3), x, 0.0).item() > 0


def test_equal_examples_and_batches_too_small_give_no_nan():
    for loss in (probability_loss, lambda s, t: order_loss(s, t, 0.1)):
        for batch in (torch.ones(4, 3), torch.ones(1, 3), torch.zeros(3, 3), torch.tensor([[1.0, 2], [1, 2], [0, 1]])):
            student = batch.clone().requires_grad_()
            loss(student, torch.randn(len(batch), 3)).backward()
            assert student.grad.isfinite().all()


def test_a_run_computes_the_equation_and_padding_does_not_matter(tmp_path):
    teacher = pair()[1]
    student, data = make_student(teacher, num_hidden_layers=2, hidden_size=16), rows(6)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        states = [m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher)]
    means = [torch.stack([s[-1][b][real[b]].double().mean(dim=0) for b in range(6)]).tolist() for s in states]
    expected = {"eval_probability_loss": divergence(*means) / 6, "eval_order_loss": hinges(*means, 0.2) / 6}
    for rows_ in (data, padded(data)):
        terms = [hfc.NeighbourProbabilities(), hfc.NeighbourOrder(margin=0.2)]
        run = with_terms(tmp_path, terms, student, teacher, rows_, per_device_eval_batch_size=6, max_steps=1)
        found = run.evaluate()
        # in float32 the thirty probabilities of some 0.2 are right to 1e-8 each, and so is their divergence to 2e-7
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=2e-7)
    before = [p.detach().clone() for p in student.parameters()]
    run.train()
    assert not all(map(torch.equal, before, student.parameters()))


def test_bad_input_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="probability_weight must be above 0"):
        hfc.NeighbourProbabilities(probability_weight=0.0)
    with pytest.raises(ValueError, match="margin 0 or more, got 1.0 and -1"):
        hfc.NeighbourOrder(margin=-1.0)
    with pytest.raises(ValueError, match="relations points to hidden state 9 of the teacher"):
        with_terms(tmp_path, [hfc.NeighbourOrder(relations="1:9")], *pair())
