"""Hard-concrete gates against their definition, and the heads they close."""

import pytest
import torch
from distillation.data import rows
from helpers import tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments, train
from silence import logits
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.methods.hard_concrete import open_probability, sample_gates, settled_gates
from hf_compress.training.state import attached

STATE = TrainerState(max_steps=8)


def test_the_penalty_is_the_share_of_samples_that_are_open():
    """P(gate > 0) = sigmoid(log_alpha - b log(-g / z)), counted over many draws."""
    torch.manual_seed(0)
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    draws = torch.stack([sample_gates(log_alpha) for _ in range(20_000)])
    assert draws.min() == 0 and draws.max() == 1
    torch.testing.assert_close((draws > 0).double().mean(0), open_probability(log_alpha), rtol=0, atol=0.012)


def test_values_by_hand():
    assert open_probability(torch.tensor(0.0)).item() == pytest.approx(1 / (1 + 11 ** (-2 / 3)))  # -z / g = 11
    assert settled_gates(torch.tensor([0.0, 9.0, -9.0])).tolist() == pytest.approx([0.5, 1.0, 0.0])


def test_the_penalty_enters_as_its_own_gradient():
    """Against autograd through l0 * sum open_probability, on top of whatever gradient is there."""
    model, callback = tiny_model("bert"), hfc.HeadGates(0.3, gate_rate=50.0)
    trainer = OurTrainer(model, arguments("unused"), callbacks=[callback])
    state = trainer.training_state
    with attached(state, model):
        callback.on_train_begin(None, STATE, None, model=model)
        parameter = state.head_gates_1
        parameter.grad = torch.ones_like(parameter)
        x = parameter.detach().double().requires_grad_()
        (0.3 * open_probability(x * 50.0).sum()).backward()
        callback.on_pre_optimizer_step(None, None, None)
        torch.testing.assert_close(parameter.grad.double(), 1 + x.grad, rtol=1e-5, atol=1e-7)
        callback.on_train_end(None, STATE, None)


def test_gates_are_settled_at_zero_or_one_and_nothing_is_lost_on_the_way_to_finish(tmp_path):
    """From `end` on they stand still, and the model in between is the one that finish gives, without any hook."""

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(torch.stack(callback.gates()))

    callback, seen = hfc.HeadGates(0.0, end=0.5), []
    data, model = rows(), tiny_model("bert")
    trainer = OurTrainer(model, arguments(tmp_path), train_dataset=data, callbacks=[callback, Watch()])
    for i in range(4):
        state = trainer.training_state
        getattr(state, f"head_gates_{i}").data = torch.tensor([-9.0, 9.0, 0.3, 0.9 - i / 2]) / callback.gate_rate
    trainer.train()
    assert all(((gates > 0) & (gates < 1)).any() for gates in seen[:3])
    assert all(torch.equal(gates, seen[-1]) and set(gates.unique().tolist()) == {0, 1} for gates in seen[3:])
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.double().eval()
    expected = logits(model, batch := tiny_batch(model))
    callback.finish(model)
    assert [a.num_heads for a in anatomy(model).attentions] == [int(gates.sum()) for gates in seen[-1]]
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("verb", ["quantize", "to_block_sparse"])
def test_closed_heads_stay_closed_whatever_happens_before_finish(verb, tmp_path):
    """Packing an unfinished model is refused by name; a copy of its weights alone has the heads at zero as well."""
    callback = hfc.HeadGates(5.0, gate_rate=3000.0)
    model = train(tmp_path, callback)
    with pytest.raises(ValueError, match=f"has been trained with HeadGates, and {verb} would lose that"):
        getattr(hfc, verb)(model)
    model.save_pretrained(tmp_path / "training-form")
    loaded = type(model).from_pretrained(tmp_path / "training-form").eval()
    assert torch.equal(logits(loaded), logits(model))
    hfc.finish(model)
    getattr(hfc, verb)(model)


def test_a_strong_penalty_closes_gates(tmp_path):
    shares = []
    for l0 in (0.0, 5.0):
        callback = hfc.HeadGates(l0, gate_rate=3000.0)
        train(tmp_path, callback)
        shares.append(torch.cat(callback.gates()).mean().item())
    assert shares[1] < 0.2 < 0.6 < shares[0]


@pytest.mark.parametrize(("l0", "says"), [(0.0, False), (500.0, True)])
def test_a_penalty_that_closes_all_gates_is_told_once(l0, says, tmp_path, caplog):
    train(tmp_path, hfc.HeadGates(l0, gate_rate=30_000.0))
    assert caplog.text.count("no gate is left open") == int(says)
