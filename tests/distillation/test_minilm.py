"""MiniLM: its equations, head counts, masked positions and the two ways to use it."""

import math
from functools import partial

import pytest
import torch
from helpers import tiny_model

from distillation.data import rows
from distillation.training import assert_gradient_is_the_same_however_cut, padded, pair, random, trainer_of
from hf_compress.distillation.losses import relations as losses
from hf_compress.distillation.losses.relations import distribution_loss, relation_loss
from hf_compress.distillation.methods.minilm import MiniLMConfig, MiniLMTrainer
from hf_compress.distillation.students import make_student

V1 = {"eval_attention_loss", "eval_value_relation_loss"}
V2 = {"eval_query_relation_loss", "eval_key_relation_loss", "eval_value_relation_loss"}


trainer = partial(trainer_of, MiniLMTrainer)


def softmax(row):
    exps = [math.exp(x - max(row)) for x in row]
    return [e / sum(exps) for e in exps]


def relations(states, num_heads, real):
    """softmax(X X^T / sqrt(d_r)) of every example, head and real query, over real keys; written out."""
    found = {}
    for b, heads in enumerate(states):  # (H, T, Dh)
        tokens = [[x for head in heads for x in head[t].tolist()] for t in range(heads.shape[1])]  # heads joined
        size = len(tokens[0]) // num_heads
        for r in range(num_heads):
            parts = [token[r * size : (r + 1) * size] for token in tokens]
            for q in real[b]:
                row = [sum(x * y for x, y in zip(parts[q], parts[k], strict=True)) / math.sqrt(size) for k in real[b]]
                found[b, r, q] = softmax(row)
    return found


def test_relation_loss_is_its_equation_for_unequal_heads():
    """2 heads of 6 against 4 heads of 6 dimensions, compared by 3 relation heads."""
    student, teacher = random(2, 2, 3, 6), random(2, 4, 3, 6, seed=1)
    mask, real = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), [[0, 1, 2], [0, 1]]
    q, p = relations(student, 3, real), relations(teacher, 3, real)
    expected = sum(a * math.log(a / b) for key in p for a, b in zip(p[key], q[key], strict=True)) / 3
    assert relation_loss(student, teacher, 3, mask).item() == pytest.approx(expected, rel=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_loss(x, teacher, 3, mask), student)


def test_distribution_loss_is_its_equation():
    student, teacher = random(2, 2, 3, 3).requires_grad_(), random(2, 2, 3, 3, seed=1)
    causal = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    allowed = (causal & mask[:, None, :])[:, None]
    expected, gradient = 0.0, torch.zeros_like(student)
    for b, h, t in [(b, h, t) for b in range(2) for h in range(2) for t in range(3) if mask[b, t]]:
        keys = [k for k in range(3) if allowed[b, 0, t, k]]
        q, p = (softmax([scores[b, h, t, k].item() for k in keys]) for scores in (student, teacher))
        expected += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 2
        for k, x, y in zip(keys, p, q, strict=True):
            gradient[b, h, t, k] = (y - x) / 2
    loss = distribution_loss(student, teacher, allowed, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(student.grad, gradient.detach(), rtol=1e-10, atol=1e-12)


def test_masked_positions_never_matter():
    student, teacher = random(2, 2, 4, 6), random(2, 4, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    expected = relation_loss(student, teacher, 2, mask)
    student, teacher = (x.masked_fill(~mask[:, None, :, None], 1e3).requires_grad_() for x in (student, teacher))
    loss = relation_loss(student, teacher, 2, mask)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert not student.grad.masked_select(~mask[:, None, :, None]).any() and student.grad.isfinite().all()
    assert teacher.grad is None
    scores = random(2, 2, 4, 4).requires_grad_(), random(2, 2, 4, 4, seed=1)
    allowed = mask[:, None, None, :].expand(2, 1, 4, 4)
    expected = distribution_loss(*scores, allowed, mask)
    changed = [x.detach().masked_fill(~(allowed & mask[:, None, :, None]), float("nan")) for x in scores]
    loss = distribution_loss(changed[0].requires_grad_(), changed[1], allowed, mask)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert not changed[0].grad[changed[0].isnan()].any()


def test_a_batch_cut_into_parts_gives_the_same_loss_and_gradient(monkeypatch):
    student, teacher = random(5, 2, 4, 6).requires_grad_(), random(5, 4, 4, 3, seed=1)
    mask = torch.arange(4) < torch.tensor([4, 3, 1, 2, 4])[:, None]
    allowed = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    results = []
    for score_bytes in (2**20, 2 * 4 * 4 * 8 * 2):  # all examples at once; two at a time
        monkeypatch.setattr(losses, "CPU_SCORE_BYTES", score_bytes)
        loss = relation_loss(student, teacher, 2, mask)
        scores = distribution_loss(student @ student.mT, teacher[:, :2] @ teacher[:, :2].mT, allowed, mask)
        results.append((loss.detach(), scores.detach(), *torch.autograd.grad(loss + scores, student)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_relations_are_those_of_the_models(version, attn, tmp_path):
    """Attention distributions are the model's own; values are read from the projections. Padding changes nothing."""
    teacher = tiny_model(attn="eager", seed=3, initializer_range=0.3)
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16)
    data = rows(4)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    kls = {"attention": [], "value": []}
    with torch.no_grad():
        runs = [(m, m(**inputs, output_attentions=True, output_hidden_states=True)) for m in (student, teacher)]
    q, p = (run.attentions[layer] for (_, run), layer in zip(runs, (1, 2), strict=True))
    values = []
    for (model, run), layer in zip(runs, (1, 2), strict=True):
        values.append(model.bert.encoder.layer[layer].attention.self.value(run.hidden_states[layer]).double())
    for b in range(4):
        n = int(real[b].sum())
        kls["attention"] += (p[b, :, :n, :n] * (p[b, :, :n, :n] / q[b, :, :n, :n]).log()).sum(-1).mean(0).tolist()
        heads = [v[b, :n].unflatten(-1, (4, -1)).transpose(0, 1) for v in values]
        b_student, b_teacher = ((v @ v.mT / math.sqrt(v.shape[-1])).softmax(-1) for v in heads)
        kls["value"] += (b_teacher * (b_teacher / b_student).log()).sum(-1).mean(0).tolist()
    for model in (student, teacher):
        model.set_attn_implementation(attn)
    options = dict(version=version, teacher_layer=3, **({"relation_heads": 4} if version == 2 else {}))
    for batch in (data, padded(data)):
        found = trainer(tmp_path, student, teacher, batch, **options).evaluate()
        assert (V1 if version == 1 else V2) <= found.keys()
        assert found["eval_value_relation_loss"] == pytest.approx(sum(kls["value"]) / int(real.sum()), rel=1e-4)
        if version == 1:
            assert found["eval_attention_loss"] == pytest.approx(sum(kls["attention"]) / int(real.sum()), rel=1e-4)
        assert found["eval_loss"] == pytest.approx(sum(found[n] for n in (V1 if version == 1 else V2)), rel=1e-5)


@pytest.mark.parametrize(("kind", "version"), [("classification", 1), ("clm", 2)], ids=["encoder-v1", "causal-v2"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(kind, version, tmp_path):
    options = dict(version=version, intermediate_share=1.0)
    assert_gradient_is_the_same_however_cut(tmp_path, MiniLMTrainer, kind, **options)


def test_relations_then_predictions_on_a_task(tmp_path):
    run = trainer(tmp_path, data=rows(8), max_steps=4, per_device_train_batch_size=2)
    run.train()
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert ["query_relation_loss" in entry for entry in steps] == [True, True, False, False]
    assert ["soft_loss" in entry for entry in steps] == [False, False, True, True]


def test_plain_text_needs_no_labels_and_relations_last_to_the_end(tmp_path):
    student, teacher = (tiny_model("bert", "mlm", seed=seed, initializer_range=0.3) for seed in (1, 2))
    plain = rows(4).remove_columns("labels")
    run = trainer(tmp_path, student, teacher, plain, intermediate_share=1.0, max_steps=8)
    start = run.evaluate()
    run.train()
    end = run.evaluate()
    assert start.keys() >= V2 and end.keys() >= V2 and end["eval_loss"] < start["eval_loss"]
    assert end["eval_loss"] == pytest.approx(sum(end[name] for name in V2), rel=1e-5)
    assert run.predict(plain).predictions.shape == (4, 12, 64)
    masked = run.evaluate(rows(4, kind="mlm"))
    assert {name: masked[name] for name in V2} == pytest.approx({name: end[name] for name in V2})


@pytest.mark.parametrize(
    ("heads", "width", "expected"), [(4, 32, 2), (2, 24, 2), (3, 27, 1)], ids=["same", "narrower", "nothing-common"]
)
def test_relation_heads_of_its_own_choice_divide_both_widths(heads, width, expected, tmp_path):
    """The teacher's width is 32: at most two relation heads of 16."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": heads, "hidden_size": width}
    student = make_student(pair()[1], **sizes, weights="fresh")  # with larger heads than the teacher's
    (term,) = trainer(tmp_path, student).phase.terms
    assert term.num_relation_heads == expected


def test_bad_input_is_refused_before_training(tmp_path):
    two_heads = make_student(pair()[1], num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="last layer has 2 heads, .*layer.3.* of the teacher 4. .* version=2"):
        trainer(tmp_path, two_heads, version=1)
    with pytest.raises(ValueError, match=r"relation_heads=3, width 32. Choose one of \[1, 2, 4, 8, 16, 32\]"):
        trainer(tmp_path, relation_heads=3)
    with pytest.raises(ValueError, match="teacher_layer must lie between 1 and 4, the teacher's layers, got 5"):
        trainer(tmp_path, teacher_layer=5)
    with pytest.raises(ValueError, match="relation_heads=2 is for version 2"):
        MiniLMConfig(str(tmp_path), version=1, relation_heads=2)
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        MiniLMConfig(str(tmp_path), version=3)
