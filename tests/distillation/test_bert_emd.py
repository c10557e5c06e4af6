"""BERT-EMD: the flow is the cheapest there is, the loss is its cost, and layers that travel cheaply weigh more."""

from functools import partial
from itertools import permutations

import pytest
import torch
from helpers import tiny_model

from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, padded, pair, random, trainer_of
from hf_compress.distillation.losses.transport import optimal_flow
from hf_compress.distillation.methods.bert_emd import BertEmdConfig, BertEmdTrainer, cost_attention
from hf_compress.distillation.students import make_student

trainer = partial(trainer_of, BertEmdTrainer)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("supply", "demand"),
    [([2, 2, 2], [1, 1, 1, 1, 1, 1]), ([1, 4, 1], [3, 2, 1]), ([6], [1, 5]), ([1, 2, 3], [3, 3])],
    ids=["layers", "square", "one", "uneven"],
)
def test_the_flow_is_the_cheapest(supply, demand, seed):
    """Against all ways to pair six units of mass, each a sixth."""
    costs = random(len(supply), len(demand), seed=seed)
    if seed:  # seed 0 has negative costs
        costs = costs.abs() * 1e6
    mass = [torch.tensor(x, dtype=torch.float64) / 6 for x in (supply, demand)]
    flow = optimal_flow(costs, *mass)
    assert (flow >= 0).all()
    torch.testing.assert_close(flow.sum(dim=1), mass[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.sum(dim=0), mass[1], rtol=0, atol=1e-10)
    sources = [i for i, n in enumerate(supply) for _ in range(n)]
    sinks = [j for j, n in enumerate(demand) for _ in range(n)]
    table = costs.tolist()
    ways = [sum(table[i][sinks[k]] for i, k in zip(sources, order, strict=True)) for order in permutations(range(6))]
    assert (flow * costs).sum().item() == pytest.approx(min(ways) / 6, rel=1e-9)
    assert (flow > 0).sum() < len(supply) + len(demand)  # a corner of the polytope: few pairs teach


def test_equal_costs_in_ties_end():
    flow = optimal_flow(torch.zeros(3, 5), torch.full((3,), 1 / 3), torch.full((5,), 1 / 5))
    torch.testing.assert_close(flow.sum(dim=1), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-7)


def test_cost_attention_is_its_equation():
    """Unit costs 1, 2 and 5 of 8: softmax of 8, 4 and 1.6, each over the temperature."""
    costs = torch.tensor([[1.0, 9.0], [9.0, 2.0], [5.0, 5.0]])
    flow = torch.tensor([[0.2, 0.0], [0.0, 0.3], [0.3, 0.2]])
    found = cost_attention(costs, flow, torch.tensor([0.2, 0.3, 0.5]), temperature=2.0)
    torch.testing.assert_close(found, torch.tensor([8.0, 4.0, 1.6]).div(2).softmax(dim=0))
    even = cost_attention(torch.zeros(3, 2), flow, torch.tensor([0.2, 0.3, 0.5]), temperature=2.0)
    torch.testing.assert_close(even, torch.tensor([0.2, 0.3, 0.5]))


def test_a_run_computes_the_equation_and_padding_does_not_matter(tmp_path):
    """With the first, uniform flow and with the one that follows from the costs, recomputed pair by pair."""
    teacher = tiny_model(attn="eager", seed=3, initializer_range=0.3)
    student = make_student(teacher, num_hidden_layers=2).train()
    data = rows(4)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    student.eval()
    with torch.no_grad():
        mine, theirs = (m(**inputs, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    d = torch.stack([torch.stack([(a - b)[real].square().mean(dim=-1).sum() for b in theirs]) for a in mine])
    flow = optimal_flow(d, torch.full((2,), 0.5), torch.full((4,), 0.25))
    for batch in (data, padded(data)):
        run = trainer(tmp_path, student, teacher, batch, attention_weight=0.0)
        (term,) = run.phase.terms
        term._costs = {"hidden_state": d}
        assert run.evaluate()["eval_hidden_state_loss"] == pytest.approx(d.mean().item() / int(real.sum()), rel=1e-5)
        term.after_step(run.training_state, run.accelerator)
        torch.testing.assert_close(run.training_state.hidden_state_flow, flow.float())
        expected = (flow * d).sum().item() / int(real.sum())
        assert run.evaluate()["eval_hidden_state_loss"] == pytest.approx(expected, rel=1e-5)
        assert run.training_state.student_weights.sum() == pytest.approx(1.0)


def test_flows_follow_the_costs_are_saved_and_resumed(tmp_path):
    student, teacher = pair()
    run = trainer(tmp_path, student, teacher, max_steps=2, save_strategy="steps", save_steps=1)
    uniform = run.training_state.attention_flow.clone()
    run.train()
    state = {name: value.clone() for name, value in run.training_state.state_dict().items()}
    assert not torch.equal(state["attention_flow"], uniform) and not torch.equal(state["hidden_state_flow"], uniform)
    assert (state["attention_flow"] > 0).sum() < 2 + 4
    entry = run.state.log_history[0]
    parts = 0.5 * entry["task_loss"] + 0.5 * entry["soft_loss"] + entry["hidden_state_loss"] + entry["attention_loss"]
    assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    again = trainer(tmp_path, pair()[0], teacher, max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in again.training_state.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    assert_gradient_is_the_same_however_cut(tmp_path, BertEmdTrainer)


def test_bad_input_is_refused_before_training(tmp_path):
    two_heads = make_student(pair()[1], num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(
        ValueError, match=r"student's layers have \[2\] heads, the teacher's \[4\]. .*attention_weight=0"
    ):
        trainer(tmp_path, two_heads)
    (term,) = trainer(tmp_path, two_heads, attention_weight=0.0).phase.terms
    assert term.compared == ["hidden_state"]
    with pytest.raises(ValueError, match="BERT-EMD maps the layers of one stack"):
        trainer(tmp_path, *pair("bart"), rows(kind="seq2seq"))
    with pytest.raises(ValueError, match="weight_temperature must be above 0, got 0"):
        BertEmdConfig(str(tmp_path), weight_temperature=0.0)
