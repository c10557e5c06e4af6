"""Several teachers are one teacher whose probabilities are the mean of theirs."""

import pytest
import torch
from helpers import tiny_model

from distillation.data import rows
from distillation.test_trainer import config, pair
from hf_compress.distillation.losses.sums import binary_soft_loss, logit_loss, soft_loss
from hf_compress.distillation.methods.tinybert import TinyBertTrainer
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.several_teachers import mean_logits, weigh_teachers
from hf_compress.distillation.trainer import DistillationTrainer

WEIGHTS = [0.5, 0.2, 0.3]


def random_logits():
    generator = torch.Generator().manual_seed(0)
    teachers = 3 * torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)
    return teachers, torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)


def entropy_distance(p, q):
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("kind", ["soft", "binary", "logits"])
def test_the_loss_is_that_of_the_mean(kind):
    """tau^2 * KL(sum of w_m softmax(z_m / tau) || softmax(z_s / tau)), in float64, with its gradient."""
    tau, (teachers, student) = 3.0, random_logits()
    shares = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    if kind == "soft":
        expected = tau**2 * entropy_distance(
            (shares * (teachers / tau).softmax(-1)).sum(0), (student / tau).softmax(-1)
        )
    elif kind == "binary":
        p, q = (shares * (teachers / tau).sigmoid()).sum(0), (student / tau).sigmoid()
        expected = tau**2 * (entropy_distance(p, q) + entropy_distance(1 - p, 1 - q)) / 4
    else:
        expected = ((shares * teachers).sum(0) - student).square().mean(-1).sum()
    logits = mean_logits(list(teachers), WEIGHTS, temperature=tau, kind=kind).double()
    losses = {"soft": soft_loss, "binary": binary_soft_loss}
    loss = logit_loss(student, logits) if kind == "logits" else losses[kind](student, logits, tau)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["soft", "binary", "logits"])
def test_teachers_that_agree_and_teachers_without_weight(kind):
    teachers, _ = random_logits()
    same = mean_logits([teachers[0], teachers[0]], [0.3, 0.7], temperature=2.0, kind=kind)
    only = mean_logits(list(teachers), [1.0, 0.0, 0.0], temperature=2.0, kind=kind)
    for logits in (same, only):  # softmax does not see a constant
        shift = (logits - teachers[0].float()).mean(-1, keepdim=True) if kind == "soft" else 0.0
        torch.testing.assert_close(logits - shift, teachers[0].float(), rtol=1e-4, atol=1e-4)


def test_live_cached_and_loaded_teachers_in_one_list(tmp_path):
    """The soft loss of two teachers, one of them by folder and one cached, is that of both in memory."""
    student, teacher = pair(num_labels=3)
    other, data = tiny_model("bert", seed=9, num_labels=3, num_hidden_layers=3), rows(8, labels=3)
    for model in (teacher, other):
        model.classifier.weight.data *= 30  # sure of something
    teacher.save_pretrained(tmp_path / "teacher")
    cached = cache_teacher(other, data, tmp_path / "cache")
    losses = []
    for teachers in ([teacher, other], [tmp_path / "teacher", cached]):
        args = config(tmp_path, teacher_weights=[3, 1])
        trainer = DistillationTrainer(student, args, teacher_model=teachers, train_dataset=data, eval_dataset=data)
        losses.append(trainer.evaluate()["eval_soft_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    batch = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p, q = ((model(**batch).logits.double() / 2).softmax(-1) for model in (teacher, other))
        log_student = (student(**batch).logits.double() / 2).log_softmax(-1)
    mean = 0.75 * p + 0.25 * q
    expected = 4 * (mean * (mean.log() - log_student)).sum(-1).mean()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    trainer.train()
    assert not any(p.requires_grad for one in trainer.teacher.all for p in one.parameters())


def test_each_teacher_must_match(tmp_path):
    student, teacher = pair()

    def trainer(teachers, kind=DistillationTrainer, **options):
        return kind(student, config(tmp_path, kind.config_class, **options), teacher_model=teachers)

    with pytest.raises(ValueError, match="the student has num_labels=2, the teacher num_labels=5"):
        trainer([teacher, tiny_model("bert", num_labels=5)])
    with pytest.raises(ValueError, match=r"must give each of the 2 teachers a share .* got \[1.0, 2.0, 3.0\]"):
        trainer([teacher, teacher], teacher_weights=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"share of 0 or more, not all 0: got \[-1.0, 2.0\]"):
        trainer([teacher, teacher], teacher_weights=[-1.0, 2.0])
    with pytest.raises(ValueError, match=r"are for a list of teachers, but teacher_model is one"):
        trainer(teacher, teacher_weights=[1.0])
    with pytest.raises(ValueError, match="must hold two or more, got 1"):
        trainer([teacher])
    with pytest.raises(ValueError, match="layers of 2 teachers have no mean"):
        trainer([teacher, teacher], hints="1:2")
    with pytest.raises(ValueError, match="TinyBertTrainer learns from inner layers"):
        trainer([teacher, teacher], kind=TinyBertTrainer)


def test_teachers_below_the_cut_off_have_no_weight(tmp_path):
    scores = {"good": 0.8, "fair": 0.76, "poor": 0.7}
    teachers = list(scores)
    assert weigh_teachers(teachers, scores.get, cut_off=0.95) == [1.0, 1.0, 0.0]  # 0.76 is 0.95 of 0.8
    assert weigh_teachers(teachers, scores.get, cut_off=0.96, weights=[2, 3, 4]) == [2, 0.0, 0.0]
    assert weigh_teachers(teachers, scores.get, cut_off=0.5) == [1.0, 1.0, 1.0]
    for options, message in (
        (dict(cut_off=0.0), "share of the best"),
        (dict(weights=[1.0]), "3 teachers and 1 weights"),
    ):
        with pytest.raises(ValueError, match=message):
            weigh_teachers(teachers, scores.get, **options)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="0 or more"):
            weigh_teachers(teachers, lambda _, bad=bad: bad)
    models = [tiny_model("bert", seed=seed) for seed in (3, 4)]
    weights = weigh_teachers(models, lambda model: 1.0 if model is models[1] else 0.5)
    data, student = rows(4), pair()[0]
    losses = [
        DistillationTrainer(
            student,
            config(tmp_path, teacher_weights=given),
            teacher_model=teacher,
            train_dataset=data,
            eval_dataset=data,
        ).evaluate()["eval_soft_loss"]
        for teacher, given in ((models, weights), (models[1], None))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
