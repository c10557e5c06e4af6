"""Gates on the components of factorised maps: the Lagrangian by its equation, the size that is reached, exact ends."""

import copy

import pytest
import torch
from distillation.data import rows
from helpers import TASKS, default_task, tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments, train
from silence import logits
from transformers import Trainer
from transformers.trainer_callback import TrainerState

import hf_compress as hfc
from hf_compress.layers.low_rank import LowRankLinear
from hf_compress.model.anatomy import layer_maps
from hf_compress.pruning.methods.hard_concrete import open_probability, settled_gates
from hf_compress.recipe.stages import read_stages
from hf_compress.training.state import attached


def factorised(family="bert", rank=6, **changes):
    return hfc.factorise(tiny_model(family, **changes), rank=rank)


def products(model):
    return [m for m in layer_maps(model).values() if isinstance(m, LowRankLinear)]


def size(model):
    return sum(m.table.numel() + m.projection.numel() for m in products(model))


def test_the_gates_go_down_and_the_multipliers_up_the_lagrangian():
    """Both gradients against autograd through the equation in float64, at the third of eight steps."""
    model, callback = factorised(rank=3), hfc.RankGates(0.6, warm_up=0.5, multiplier_rate=0.7, gate_rate=50.0)
    trainer = OurTrainer(model, arguments("unused"), callbacks=[callback])
    with attached(state := trainer.training_state, model):
        callback.on_train_begin(None, TrainerState(max_steps=8), None, model=model)
        maps, generator = products(model), torch.Generator().manual_seed(0)
        for i in range(len(maps)):
            getattr(state, f"rank_gates_{i}").data = torch.randn(3, generator=generator) / 50
        callback.multipliers.copy_(torch.tensor([-0.4, 0.9]))
        alphas = [callback.log_alpha(i).detach().double().requires_grad_() for i in range(len(maps))]
        m = torch.tensor([-0.4, 0.9], dtype=torch.float64, requires_grad=True)
        sizes = [one.in_features + one.out_features for one in maps]
        kept, whole = sum(n * open_probability(a).sum() for n, a in zip(sizes, alphas, strict=True)), 3 * sum(sizes)
        excess = (1 - kept / whole) - 0.6 * 3 / 4
        (m[0] * excess + m[1] * excess**2).backward()
        callback.on_pre_optimizer_step(None, TrainerState(max_steps=8, global_step=2), None)
        for i, a in enumerate(alphas):
            found = getattr(state, f"rank_gates_{i}").grad.double()
            torch.testing.assert_close(found, 50 * a.grad, rtol=1e-5, atol=1e-7)  # gates are float32
        torch.testing.assert_close(callback.multipliers.double(), (m + 0.7 * m.grad).detach(), rtol=0, atol=1e-6)
        callback.on_train_end(None, TrainerState(max_steps=8), None)


def test_a_gated_map_is_the_sum_of_its_components():
    """Eq. 67, one component after the other in float64, in eval mode."""
    model = factorised(rank=3).double()
    callback = hfc.RankGates(0.5)
    trainer = OurTrainer(model, arguments("unused"), callbacks=[callback])
    with attached(state := trainer.training_state, model):
        callback.on_train_begin(None, TrainerState(max_steps=8), None, model=model)
        state.rank_gates_1.data = torch.tensor([-9.0, 0.3, 2.0]) / callback.gate_rate
        module, x = products(model)[1], torch.randn(4, 32, dtype=torch.float64)
        gates = settled_gates(callback.log_alpha(1)).double()
        weight = sum(gates[k] * module.table[:, k, None] * module.projection[None, :, k] for k in range(3))
        torch.testing.assert_close(module(x), x @ weight.T + module.bias, rtol=1e-12, atol=1e-12)
        callback.on_train_end(None, TrainerState(max_steps=8), None)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_the_size_is_reached_and_what_is_cut_is_exact(family, tmp_path):
    model, callback = factorised(family), hfc.RankGates(0.6, end=0.5)
    before = size(model)
    data = rows(kind=default_task(family))
    OurTrainer(model, arguments(tmp_path), train_dataset=data, callbacks=[callback]).train()
    twin = copy.deepcopy(model).double().eval()
    batch = tiny_batch(model)
    expected = logits(twin, batch)
    assert callback.finish(model) is model
    sizes = [one.in_features + one.out_features for one in products(model)]
    opened = [int(gates.sum()) for gates in callback.gates()]
    assert 0.4 * before - max(sizes) < sum(map(int.__mul__, sizes, opened)) <= 0.4 * before
    assert [m.rank for m in products(model)] == [max(number, 1) for number in opened]  # an empty one keeps a zero
    torch.testing.assert_close(logits(hfc.finish(twin), batch), expected, rtol=0, atol=1e-12)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded, info = TASKS[default_task(family)].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    # the same numbers lie elsewhere: products of odd ranks go by the memory's alignment, to 1 in the last bit
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    assert [m.rank for m in products(loaded)] == [m.rank for m in products(model)]


def test_components_that_no_gate_needs_go_first_and_an_empty_map_keeps_one(tmp_path):
    model, callback = factorised(), hfc.RankGates(0.5, warm_up=0.0, end=0.1)
    trainer = OurTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(), callbacks=[callback])
    for i in range(24):
        getattr(trainer.training_state, f"rank_gates_{i}").data.fill_((-1.0) ** i * 3 / callback.gate_rate)
    trainer.train()
    assert [int(gates.sum()) for gates in callback.gates()[:4]] == [6, 0, 6, 0]
    model.double().eval()
    expected = logits(model)
    hfc.finish(model)
    assert products(model)[1].rank == 1 and not products(model)[1].dense_weight().any()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_a_resumed_training_ends_in_the_same_bits(tmp_path):
    whole, again = (hfc.RankGates(0.6, multiplier_rate=300.0) for _ in range(2))
    data = rows()
    expected = train(tmp_path, whole, factorised(), data=data, save_strategy="steps", save_steps=4)
    found = train(tmp_path, again, factorised(seed=9), data=data, resume=str(tmp_path / "checkpoint-4"))
    for (key, tensor), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    assert torch.equal(whole.multipliers, again.multipliers) and whole.multipliers[1] > 0


def test_it_is_distilled_with_a_term_and_a_table_that_is_tied_to_its_head_is_left_alone(tmp_path):
    student, teacher = hfc.factorise_embeddings(factorised(task="mlm"), 4), tiny_model("bert", "mlm", seed=3)
    assert isinstance(student.get_output_embeddings(), LowRankLinear)
    hfc.DistillationTrainer(
        student, arguments(tmp_path, hfc.DistillationConfig), terms=[hfc.Hints(hints="2:2")], teacher_model=teacher,
        callbacks=[hfc.RankGates(0.5)], train_dataset=rows(kind="mlm"),
    ).train()  # fmt: skip
    assert student.get_output_embeddings().rank == 4 and size(student) <= 0.51 * size(factorised(task="mlm"))
    student.eval().save_pretrained(tmp_path / "saved")
    loaded = TASKS["mlm"].from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(student), rtol=0, atol=1e-6)


def test_a_recipe_factorises_and_learns_the_ranks():
    """What the two stages of one do, without the training data."""
    written = {"method": "low-rank", "energy": 0.9}, {"method": "rank-gates", "sparsity": 0.4}
    first, second = read_stages([{"prune": options} for options in written])
    model, _ = first.own.apply(tiny_model("bert"), None, None)
    assert products(model) and not first.reads and second.own.callback().sparsity == 0.4
    assert second.own.callback().places(model) == products(model)


def test_what_has_no_components_is_refused_before_the_first_step(tmp_path):
    for model in (tiny_model("bert"), hfc.factorise_embeddings(tiny_model("bert", "mlm"), 4)):
        with pytest.raises(ValueError, match="needs maps that are products, and .* call hfc.factorise"):
            _ = OurTrainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[hfc.RankGates()]).training_state
    with pytest.raises(ValueError, match="dequantize it first"):
        hfc.RankGates().check(hfc.quantize(tiny_model("bert"), 8), [])
    with pytest.raises(ValueError, match="RankGates learns parameters of its own"):
        Trainer(factorised(), arguments(tmp_path), train_dataset=rows(), callbacks=[hfc.RankGates()]).train()
    for options in ({"sparsity": 1.0}, {"warm_up": 0.8, "end": 0.7}, {"multiplier_rate": 0.0}):
        with pytest.raises(ValueError, match="sparsity lies between 0 and 1, warm_up between 0 and end"):
            hfc.RankGates(**options)
