"""FSP: the matrix between two layers, its loss, and the flows it compares."""

from functools import partial

import pytest
import torch

from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, padded, pair, random, trainer_of
from hf_compress.distillation.methods.fsp import FSPConfig, FSPTrainer, fsp_loss, fsp_matrix, parse_flows

trainer = partial(trainer_of, FSPTrainer)


def test_the_matrix_and_the_loss_are_their_equations():
    start, end, other = random(2, 3, 4), random(2, 3, 4, seed=1), random(2, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    expected, lengths = 0.0, [3, 2]
    for b, T in enumerate(lengths):
        for i in range(4):
            for j in range(4):
                mine = sum(start[b, t, i].item() * end[b, t, j].item() for t in range(T)) / T
                theirs = sum(other[b, t, i].item() * end[b, t, j].item() for t in range(T)) / T
                assert fsp_matrix(start, end, mask)[b, i, j].item() == pytest.approx(mine, rel=1e-12)
                expected += (mine - theirs) ** 2 / 16
    assert fsp_loss((start, end), (other, end), mask).item() == pytest.approx(expected, rel=1e-12)
    start.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fsp_loss((x, end), (other, end), mask), start)


def test_masked_positions_never_matter():
    start, end, other = random(2, 3, 4), random(2, 3, 4, seed=1), random(2, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    expected = fsp_loss((start, end), (other, end), mask)
    start, end, other = (x.masked_fill(~mask[..., None], float("nan")) for x in (start, end, other))
    torch.testing.assert_close(fsp_loss((start, end), (other, end), mask), expected, rtol=1e-12, atol=0)


def test_flows_follow_the_layer_map_unless_named():
    assert parse_flows(None, 2, 4) == [((0, 1), (0, 2)), ((1, 2), (2, 4))]
    assert parse_flows("0-2:1-4", 2, 4) == [((0, 2), (1, 4))]


def test_a_run_computes_the_equation_and_padding_does_not_matter(tmp_path):
    student, teacher = pair()
    data = rows(4)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    total = 0.0
    for (a, b), (c, d) in [((0, 1), (0, 2)), ((1, 2), (2, 4))]:
        for x in range(4):
            G = [p[x][real[x]].T.double() @ q[x][real[x]].double() / int(real[x].sum())
                 for p, q in ((mine[a], mine[b]), (theirs[c], theirs[d]))]  # fmt: skip
            total += (G[0] - G[1]).square().mean().item() / 4
    for batch in (data, padded(data)):
        found = trainer(tmp_path, student, teacher, batch, fsp_weight=3.0).evaluate()
        assert found["eval_fsp_loss"] == pytest.approx(total, rel=1e-4)
        parts = 0.5 * found["eval_task_loss"] + 0.5 * found["eval_soft_loss"] + 3 * found["eval_fsp_loss"]
        assert found["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    assert_gradient_is_the_same_however_cut(tmp_path, FSPTrainer, "clm")


def test_bad_input_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="flow points to hidden state 3 of the student, which has 0 .* to 2"):
        trainer(tmp_path, flows="1-3:2-4")
    with pytest.raises(ValueError, match="flows are pairs student:teacher"):
        trainer(tmp_path, flows="1:2")
    with pytest.raises(ValueError, match="it has 4 layers, the teacher 2"):
        trainer(tmp_path, *pair()[::-1])
    with pytest.raises(ValueError, match="FSP maps the layers of one stack"):
        trainer(tmp_path, *pair("bart"), rows(kind="seq2seq"))
    with pytest.raises(ValueError, match="fsp_weight must be 0 or more, got -1"):
        FSPConfig(str(tmp_path), fsp_weight=-1.0)
