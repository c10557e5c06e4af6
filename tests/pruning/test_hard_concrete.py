"""Hard-concrete gates against their definition, and the heads they close."""

import pytest
import torch
from helpers import tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments, train
from silence import logits

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning.methods.head_gates import open_probability, sample_gates, settled_gates
from hf_compress.training.state import attached


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
        callback.on_train_begin(None, None, None, model=model)
        parameter = state.head_gates_1
        parameter.grad = torch.ones_like(parameter)
        x = parameter.detach().double().requires_grad_()
        (0.3 * open_probability(x * 50.0).sum()).backward()
        callback.on_pre_optimizer_step(None, None, None)
        torch.testing.assert_close(parameter.grad.double(), 1 + x.grad, rtol=1e-5, atol=1e-7)
        callback.on_train_end(None, None, None)


def test_closed_heads_are_cut_and_open_gates_go_into_the_weights(tmp_path):
    callback = hfc.HeadGates(0.0)
    model = train(tmp_path, callback).double()
    state, batch = callback._state, tiny_batch(model)
    for i in range(4):
        getattr(state, f"head_gates_{i}").data = torch.tensor([-9.0, 9.0, 0.3, 0.9 - i / 2]) / callback.gate_rate
    with attached(state, model):
        callback.on_train_begin(None, None, None, model=model)
        expected = logits(model, batch)
        callback.on_train_end(None, None, None)
    callback.finish(model)
    assert [a.num_heads for a in anatomy(model).attentions] == [3] * 4
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)  # gates are float32


def test_a_strong_penalty_closes_gates(tmp_path):
    shares = []
    for l0 in (0.0, 5.0):
        callback = hfc.HeadGates(l0, gate_rate=3000.0)
        train(tmp_path, callback)
        shares.append(torch.cat(callback.gates()).mean().item())
    assert shares[1] < 0.2 < 0.6 < shares[0]
