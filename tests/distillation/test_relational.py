"""Relational distillation: distances and angles of a batch, written out pair by pair and triplet by triplet."""

import math
from functools import partial

import pytest
import torch

from distillation.data import rows
from distillation.training import padded, pair, random, trainer_of
from hf_compress.distillation.methods.relational import (
    RelationalConfig,
    RelationalTrainer,
    angle_loss,
    distance_loss,
    pooled,
)
from hf_compress.distillation.students import make_student

trainer = partial(trainer_of, RelationalTrainer)


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def relative_distances(x):
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    distances = {(i, j): math.dist(x[i], x[j]) for i, j in pairs}
    mean = sum(distances.values()) / len(pairs)
    return {at: d / mean for at, d in distances.items()}


def cosines(x):
    def direction(a, b):
        return [(p - q) / math.dist(a, b) for p, q in zip(a, b, strict=True)]

    found, n = {}, range(len(x))
    for i, j, k in [(i, j, k) for i in n for j in n for k in n if len({i, j, k}) == 3]:
        found[i, j, k] = sum(p * q for p, q in zip(direction(x[i], x[j]), direction(x[k], x[j]), strict=True))
    return found


@pytest.mark.parametrize(("loss", "relation"), [(distance_loss, relative_distances), (angle_loss, cosines)])
def test_losses_are_their_equations(loss, relation):
    """Widths differ; a distance ten times the mean reaches the straight part of Huber's loss."""
    student, teacher = random(5, 3), random(5, 7, seed=1)
    student[0] += 30
    mine, theirs = relation(student.tolist()), relation(teacher.tolist())
    expected = 5 * sum(huber(mine[at] - theirs[at]) for at in mine) / len(mine)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student.requires_grad_())


def test_scale_shift_and_rotation_do_not_matter():
    x = random(4, 3)
    rotation = torch.linalg.qr(random(3, 3, seed=2)).Q
    for loss in (distance_loss, angle_loss):
        assert loss(7 * x @ rotation + 1, x).item() == pytest.approx(0.0, abs=1e-12)


def test_equal_examples_and_batches_too_small_give_no_nan():
    for loss in (distance_loss, angle_loss):
        for batch in (torch.ones(4, 3), torch.ones(1, 3), torch.tensor([[1.0, 2, 3], [1, 2, 3], [0, 0, 1]])):
            student = batch.clone().requires_grad_()
            loss(student, torch.randn(len(batch), 3)).backward()
            assert student.grad.isfinite().all()


def test_pooling_leaves_padding_out():
    states = random(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    torch.testing.assert_close(pooled(states, mask), torch.stack([states[0].mean(dim=0), states[1, 0]]))


def test_a_run_computes_the_equation_and_padding_does_not_matter(tmp_path):
    teacher = pair()[1]
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16)
    data = rows(6)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        runs = [m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher)]

    def mean_state(states, b):
        return states[b][real[b]].double().mean(dim=0)

    expected = {"eval_distance_loss": 0.0, "eval_angle_loss": 0.0}
    for batch in (range(4), range(4, 6)):  # relations within each batch; means over all six examples
        for mine, theirs in ((1, 2), (2, 4)):
            x, y = (torch.stack([mean_state(s, b) for b in batch]) for s in (runs[0][mine], runs[1][theirs]))
            expected["eval_distance_loss"] += distance_loss(x, y).item() / 6
            expected["eval_angle_loss"] += angle_loss(x, y).item() / 6
    for rows_ in (data, padded(data)):
        options = dict(relations="1:2,2:4", per_device_eval_batch_size=4)
        found = trainer(tmp_path, student, teacher, rows_, **options).evaluate()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4)


def test_the_last_states_are_the_default_and_an_encoder_decoders_are_the_decoders(tmp_path):
    assert trainer(tmp_path).phase.terms[0].relations == [(2, 4)]
    run = trainer(tmp_path, *pair("bart"), rows(4, kind="seq2seq"), max_steps=1, angle_weight=0.0)
    run.train()
    assert run.phase.terms[0].relations == [(3, 5)]
    entry = run.state.log_history[0]
    parts = 0.5 * entry["task_loss"] + 0.5 * entry["soft_loss"] + 25 * entry["distance_loss"]
    assert entry["loss"] == pytest.approx(parts, rel=1e-5) and "angle_loss" not in entry


def test_bad_input_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="relations points to hidden state 9 of the teacher"):
        trainer(tmp_path, relations="1:9")
    with pytest.raises(ValueError, match="relations are pairs student:teacher"):
        trainer(tmp_path, relations="one")
    with pytest.raises(ValueError, match="one of them above 0, got 0.0 and 0.0"):
        RelationalConfig(str(tmp_path), distance_weight=0.0, angle_weight=0.0)
