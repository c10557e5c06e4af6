"""Learned drop rates: their mean and gradient, what is drawn, and the layers that go."""

import math

import pytest
import torch
from distillation.data import rows
from helpers import tiny_model
from pruning.test_callbacks import OurTrainer, arguments, train
from silence import logits
from training.test_unfinished import tiny_longt5
from transformers import AutoModelForSequenceClassification, Trainer

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.methods.drop_rates import B, draw, passed, rate_logits


@pytest.mark.parametrize("mean", [0.05, 0.2, 0.7])
def test_the_mean_is_held_and_so_is_its_gradient(mean):
    a = torch.tensor([-3.0, 0.5, 1.0, 8.0, -40.0], dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(rate_logits(a, mean))
    assert p.mean().item() == pytest.approx(mean, rel=1e-12) and p.argsort().tolist() == a.argsort().tolist()
    weights = torch.tensor([1.0, -2.0, 0.3, 0.7, 0.1], dtype=torch.float64)
    (weights * p).sum().backward()
    for i in range(5):  # by differences, the shift sought anew on both sides
        ends = []
        for step in (-1e-5, 1e-5):
            moved = a.detach().clone()
            moved[i] += step
            ends.append((weights * torch.sigmoid(rate_logits(moved, mean))).sum().item())
        assert a.grad[i].item() == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-6, abs=1e-9)


def test_layers_are_drawn_by_their_rates():
    torch.manual_seed(0)
    z = rate_logits(torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64), 0.4)
    drawn = torch.stack([draw(z) for _ in range(20_000)])
    torch.testing.assert_close((drawn <= 0.5).double().mean(0), torch.sigmoid(z), rtol=0, atol=0.012)  # 3 sigma: 0.011


def test_a_layer_that_is_drawn_is_itself_and_the_gradient_goes_straight_through():
    generator = torch.Generator().manual_seed(0)
    x, f, g = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    x.requires_grad_(), f.requires_grad_()
    for u in (0.2, 0.9):
        z = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        s = torch.sigmoid((math.log(u / (1 - u)) - z) / B)
        out = passed(s, x, f)
        assert torch.equal(out, f if u > 0.5 else x)
        found = torch.autograd.grad((out * g).sum(), (z, x, f))
        pairs = zip(g.flatten().tolist(), f.flatten().tolist(), x.flatten().tolist(), strict=True)
        slope = sum(gradient * (output - state) for gradient, output, state in pairs)
        assert found[0].item() == pytest.approx(-slope * s.item() * (1 - s.item()) / B, rel=1e-9)
        assert torch.equal(found[1], g * (u <= 0.5)) and torch.equal(found[2], g * (u > 0.5))


def test_the_layers_with_the_highest_rates_go_and_nothing_changes_by_that(tmp_path):
    model, callback = tiny_model("bert"), hfc.LayerPruning(0.4, share=0.5, learned=True)
    trainer = OurTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(), callbacks=[callback])
    trainer.training_state.layer_pruning_rates.data = torch.tensor([9.0, -5.0, 5.0, -9.0]) / callback.gate_rate
    trainer.train()
    assert callback.removed_layers(model) == {0, 2}
    assert torch.sigmoid(callback.rate_logits).mean().item() == pytest.approx(0.4, rel=1e-5)
    expected = logits(model.eval())
    evaluated = tiny_model("bert")
    evaluated.load_state_dict(model.state_dict())
    assert torch.equal(logits(hfc.prune_layers(evaluated, [1, 3])), expected)
    assert torch.equal(logits(hfc.finish(model)), expected) and len(anatomy(model).layers) == 2
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")), expected)


def test_a_layer_that_harms_is_found(tmp_path):
    """The third layer answers with noise; beside a term and a teacher, from the command line's settings."""
    teacher, student = tiny_model("bert", seed=3), tiny_model("bert", seed=3)
    with torch.no_grad():
        student.bert.encoder.layer[2].output.LayerNorm.weight.mul_(-3.0)
    callback = hfc.LayerPruningConfig(str(tmp_path), drop_rate=0.4, share=0.25, learned=True).callback()
    args = arguments(tmp_path, hfc.DistillationConfig, max_steps=12, alpha=1.0, learning_rate=3e-4)
    hfc.DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows(), callbacks=[callback],
                            terms=[hfc.Hints(hints="4:4")]).train()  # fmt: skip
    assert callback.rate_logits.argmax().item() == 2 and len(anatomy(student).layers) == 3
    assert all(layer.output.LayerNorm.weight.min() > 0 for layer in student.bert.encoder.layer)


def test_a_resumed_training_ends_in_the_same_bits(tmp_path):
    data, found = rows(), []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        callback, saves = hfc.LayerPruning(0.4, learned=True), {"save_strategy": "no" if resume else "steps"}
        model = train(tmp_path, callback, data=data, resume=resume, save_steps=4, **saves)
        found.append([*model.parameters(), callback.rate_logits])
    assert all(map(torch.equal, *found)) and found[0][-1].std() > 0


def test_first_layers_that_hold_what_others_need_stay():
    model = tiny_longt5()
    assert {0, len(anatomy(model).stacks[0].layers)} <= set(hfc.LayerPruning(learned=True).kept_layers(model))


def test_what_does_not_go_together_is_refused(tmp_path):
    for options in ({"keep": [0]}, {"drop_rate": 0.0}, {"gate_rate": 0.0}):
        with pytest.raises(ValueError, match="Learned drop rates choose the layers by their rates"):
            hfc.LayerPruning(learned=True, **options)
    trainer = Trainer(tiny_model("bert"), arguments(tmp_path), train_dataset=rows(),
                      callbacks=[hfc.LayerPruning(learned=True)])  # fmt: skip
    with pytest.raises(ValueError, match="LayerPruning with learned rates has parameters of its own"):
        trainer.train()
