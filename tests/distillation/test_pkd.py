"""PKD: its equation, its layers, the first real token, and what it refuses."""

from functools import partial

import pytest
import torch
from helpers import tiny_model

from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, padded, pair, random, trainer_of
from hf_compress.distillation.methods.pkd import PKDConfig, PKDTrainer, first_token, patient_loss
from hf_compress.distillation.students import make_student

trainer = partial(trainer_of, PKDTrainer)


def test_patient_loss_and_its_gradient_are_their_equation():
    student, teacher = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    expected, gradient = 0.0, []
    for h, t in zip(student.tolist(), teacher.tolist(), strict=True):
        norms = [sum(x * x for x in row) ** 0.5 for row in (h, t)]
        u, v = [x / norms[0] for x in h], [x / norms[1] for x in t]
        expected += sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
        cosine = sum(a * b for a, b in zip(u, v, strict=True))  # |u - v|^2 = 2 - 2 cos
        gradient.append([2 * (cosine * a - b) / norms[0] for a, b in zip(u, v, strict=True)])
    loss = patient_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(student.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_the_first_token_is_the_first_real_one():
    states = random(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert torch.equal(first_token(states, mask), torch.stack([states[0, 0], states[1, 2], states[2, 3]]))
    assert torch.equal(first_token(states, None), states[:, 0])


@pytest.mark.parametrize(
    ("layer_map", "expected"), [("skip", [2, 4, 6, 8, 10]), ("last", [7, 8, 9, 10, 11]), ("1,1,2,3,9", [1, 1, 2, 3, 9])]
)
def test_layers_are_those_of_the_paper(layer_map, expected, tmp_path):
    """6 of 12 layers, section 3.2; the last layer of the student follows none."""
    teacher = tiny_model(num_hidden_layers=12, hidden_size=8, intermediate_size=8)
    student = make_student(teacher, num_hidden_layers=6, layers="first")
    (term,) = trainer(tmp_path, student, teacher, layer_map=layer_map).phase.terms
    assert term.layer_map == expected


@pytest.mark.parametrize("width", [32, 16], ids=["equal", "projected"])
def test_a_run_computes_the_equation_and_padding_does_not_matter(width, tmp_path):
    student, teacher = pair()
    if width < 32:
        student = make_student(teacher, num_hidden_layers=2, hidden_size=width)
    data = rows(4)
    metrics = []
    for batch in (data, padded(data)):
        torch.manual_seed(0)
        run = trainer(tmp_path, student, teacher, batch, learn_projection=width < 32, alpha=0.2, beta=10.0)
        metrics.append(run.evaluate())
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mine = run.training_state.patient(student(**inputs, output_hidden_states=True).hidden_states[1][:, 0])
        theirs = teacher(**inputs, output_hidden_states=True).hidden_states[2][:, 0]
        expected = sum((a / a.norm() - b / b.norm()).square().sum() for a, b in zip(mine, theirs, strict=True)) / 4
    for found in metrics:
        assert found["eval_patient_loss"] == pytest.approx(expected.item(), rel=1e-5)
        parts = 0.8 * found["eval_task_loss"] + 0.2 * found["eval_soft_loss"] + 10 * found["eval_patient_loss"]
        assert found["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    assert_gradient_is_the_same_however_cut(tmp_path, PKDTrainer, learn_projection=True, hints="1:2")


def test_bad_input_is_refused_before_training(tmp_path):
    teacher = pair()[1]
    with pytest.raises(ValueError, match=r"the student's is 16, the teacher's 32. .* learn_projection=True"):
        trainer(tmp_path, make_student(teacher, num_hidden_layers=2, hidden_size=16))
    with pytest.raises(ValueError, match="the student has 1, the teacher 4"):
        trainer(tmp_path, make_student(teacher, num_hidden_layers=1))
    with pytest.raises(ValueError, match="names 2 teacher layers, .* has 2 layers: name one for each but the last: 1"):
        trainer(tmp_path, layer_map="1,2")
    with pytest.raises(ValueError, match="which in GPT2LMHeadModel reads nothing but itself"):
        trainer(tmp_path, *pair("gpt2"), rows(kind="clm"))
    with pytest.raises(ValueError, match="PKD maps the layers of one stack"):
        trainer(tmp_path, *pair("bart"), rows(kind="seq2seq"))
    with pytest.raises(ValueError, match="beta must be 0 or more, got -1"):
        PKDConfig(str(tmp_path), beta=-1.0)


@pytest.mark.parametrize("family", ["fnet", "mobilebert", "convbert"])
def test_models_without_heads_have_a_first_token(family, tmp_path):
    """Hidden states are imitated, and no attention."""
    data = rows().remove_columns("attention_mask") if family == "fnet" else rows()
    run = trainer(tmp_path, *pair(family), data)
    run.train()
    assert all(entry["patient_loss"] > 0 for entry in run.state.log_history if "patient_loss" in entry)
    assert any("patient_loss" in entry for entry in run.state.log_history)
