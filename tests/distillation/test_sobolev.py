"""Gradients for embedded tokens: the equation and its own gradient against differences, padding, runs, refusals."""

import pytest
import torch
from helpers import tiny_batch, tiny_model

import hf_compress as hfc
from distillation.data import rows
from distillation.training import config, padded, pair
from hf_compress.distillation import sobolev
from hf_compress.distillation.sobolev import slopes, sobolev_loss
from hf_compress.model.anatomy import anatomy

QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)


def run_of(folder, student, teacher, data=None, **options):
    data = rows() if data is None else data
    terms = options.pop("terms", [hfc.InputGradients(sobolev_weight=2.0)])
    return hfc.DistillationTrainer(student, config(folder, **options), teacher_model=teacher, terms=terms,
                                   train_dataset=data, eval_dataset=data)  # fmt: skip


def by_differences(model, batch, v, step=1e-5):
    """d<v, z> / dH by moving one number of what the first layer reads after the other. (B, T, D)"""
    layer, moved, found = anatomy(model).layers[0].module, [], []
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + moved[0].view(args[0].shape), *args[1:]))
    B, T = batch["input_ids"].shape
    with torch.no_grad():
        for unit in torch.eye(B * T * model.config.hidden_size, dtype=torch.float64) * step:
            ends = []
            for moved[:] in ([-unit], [unit]):
                ends.append((v * model(**batch).logits).sum().item())
            found.append((ends[1] - ends[0]) / (2 * step))
    handle.remove()
    return torch.tensor(found, dtype=torch.float64).view(B, T, -1)


def small(seed, **changes):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, **QUIET}
    return tiny_model("bert", seed=seed, attn="eager", **{**sizes, "initializer_range": 0.5, **changes}).double()


def test_the_loss_of_a_run_is_its_equation(tmp_path, monkeypatch):
    """Both gradients by differences in float64; the teacher keeps its fused attention."""
    student, teacher = small(0), small(1, num_hidden_layers=2)
    teacher.set_attn_implementation("sdpa")
    v = torch.tensor([[0.3, -1.2], [0.7, 0.4]], dtype=torch.float64)
    monkeypatch.setattr(sobolev, "directions", lambda logits: v)
    data = rows(2, length=5)
    batch = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    expected = (by_differences(student, batch, v) - by_differences(teacher, batch, v)).square().sum().item() / 2
    assert expected > 1e-3
    found = run_of(tmp_path, student, teacher, data).evaluate()
    assert found["eval_sobolev_loss"] == pytest.approx(expected, rel=1e-6)
    shared = 0.5 * found["eval_task_loss"] + 0.5 * found["eval_soft_loss"]
    assert found["eval_loss"] == pytest.approx(shared + 2.0 * expected, rel=1e-5)


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_gradient_of_the_loss_is_that_of_its_differences(is_checkpointed, tmp_path, monkeypatch):
    """One step of SGD, from second derivatives, against the loss with each of some weights moved."""
    monkeypatch.setattr(sobolev, "directions", lambda logits: torch.ones_like(logits))
    student, data = small(0), rows(4, length=5)
    phases = [hfc.Phase(1.0, [hfc.InputGradients()], predictions=False)]
    args = config(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0,
                  gradient_checkpointing=is_checkpointed,
                  gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    run = hfc.DistillationTrainer(
        student, args, teacher_model=small(1), phases=phases, train_dataset=data, eval_dataset=data
    )
    weight, numbers, expected = student.bert.encoder.layer[0].attention.self.query.weight, [0, 9, 33], []
    for number in numbers:
        ends = []
        for step in (1e-5, -2e-5, 1e-5):  # the last one back again
            with torch.no_grad():
                weight.view(-1)[number] += step
            ends.append(run.evaluate()["eval_sobolev_loss"])
        expected.append((ends[0] - ends[1]) / 2e-5)
    before = weight.detach().clone()
    run.train()
    assert (before - weight.detach()).flatten()[numbers].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_in_the_mean_over_directions_it_is_the_distance_of_jacobians():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    h = torch.zeros(4000, 1, 8, dtype=torch.float64, requires_grad=True)  # as many draws of v
    torch.manual_seed(0)
    v = sobolev.directions(torch.empty(4000, 3, dtype=torch.float64))
    found = sobolev_loss(*(slopes((h @ W.T)[:, 0], h, v) for W in (mine, theirs)), torch.ones(4000, 1)) / 4000
    assert found.item() == pytest.approx(float((mine - theirs).square().sum()) / 3, rel=0.05)


@pytest.mark.parametrize("family", ["deberta-v2", "electra", "gpt2", "bart", "vit"])
def test_a_model_has_no_distance_from_itself(family, tmp_path):
    """What is captured of the student is what its first layer reads, of every family."""
    task = "image" if family == "vit" else "classification"
    student, teacher = (tiny_model(family, task, seed=3, attn="eager", pad_token_id=0).double() for _ in range(2))
    data = rows(4, kind=task)
    if family == "bart":  # predicts where its one end of a sentence is
        data = data.map(lambda row: {"input_ids": [student.config.eos_token_id, *row["input_ids"][1:]]})
    assert run_of(tmp_path, student, teacher, data).evaluate()["eval_sobolev_loss"] < 1e-25
    with torch.no_grad():
        anatomy(student).layers[1].feed_forward.output.weight.mul_(1.5)
    assert run_of(tmp_path, student, teacher, data).evaluate()["eval_sobolev_loss"] > 1e-15


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_of_a_score_there_is_one_direction(family, tmp_path, monkeypatch):
    """With labels DeBERTa gives (B,), which is no B classes: the loss is that of the same rows one by one."""
    monkeypatch.setattr(sobolev, "directions", lambda logits: torch.ones_like(logits) / logits.shape[-1] ** 0.5)
    student, teacher = (tiny_model(family, seed=seed, num_labels=1) for seed in (0, 3))
    student.set_attn_implementation("eager")
    run = run_of(tmp_path, student, teacher, rows(4, kind="regression"), per_device_eval_batch_size=4)
    whole = run.evaluate()["eval_sobolev_loss"]
    run.args.per_device_eval_batch_size = 1
    assert whole == pytest.approx(run.evaluate()["eval_sobolev_loss"], rel=1e-4)
    assert whole > 1e-10


def test_padding_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(sobolev, "directions", lambda logits: torch.ones_like(logits))
    data, found = rows(8), []
    for one in (data, padded(data)):
        found.append(run_of(tmp_path, small(0), small(1), one).evaluate()["eval_sobolev_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_an_evaluation_teaches_the_terms_beside_it_nothing(tmp_path, monkeypatch):
    """It differentiates there too; costs for the next flow, and texts to compare with, are those of training."""
    monkeypatch.setattr(sobolev, "directions", lambda logits: torch.ones_like(logits))
    states = []
    for strategy in ("no", "steps"):
        torch.manual_seed(0)
        run = run_of(
            tmp_path, small(0, num_hidden_layers=2), small(1, num_hidden_layers=2), rows(8), max_steps=4,
            eval_strategy=strategy, eval_steps=1,
            terms=[hfc.InputGradients(), hfc.LayerTransport(), hfc.SentenceVectors(queue_size=32)],
        )  # fmt: skip
        run.train()
        states.append({**run.training_state.state_dict(), **run.model.state_dict()})
    assert states[0]["queued"] == 16
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_it_learns_beside_other_terms_with_gates_and_checkpointing_and_is_finished(tmp_path):
    teacher = tiny_model("bert", seed=3)
    student = hfc.make_student(teacher, num_hidden_layers=2)
    student.set_attn_implementation("eager")
    gates = hfc.HeadGates(5.0, gate_rate=3000.0)
    run = hfc.DistillationTrainer(
        student, config(tmp_path, max_steps=4, gradient_checkpointing=True,
                        gradient_checkpointing_kwargs={"use_reentrant": False}),
        teacher_model=teacher, terms=[hfc.InputGradients(), hfc.Hints(hints="1:2")], callbacks=[gates],
        train_dataset=rows(),
    )  # fmt: skip
    run.train()
    assert all(entry["sobolev_loss"] > 0 and entry["hint_loss"] > 0 for entry in run.state.log_history[:4])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert sum(a.num_heads for a in anatomy(student).attentions) < 8
    student.eval().save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = type(student).from_pretrained(tmp_path / "saved", attn_implementation="eager")
        assert torch.equal(again(**tiny_batch(student)).logits, student(**tiny_batch(student)).logits)


def test_what_it_was_not_made_for_is_refused_before_the_first_step(tmp_path):
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"fused attention \(sdpa\) cannot: call student.set_attn_implementation"):
        run_of(tmp_path, student, teacher)
    narrow = tiny_model("bert", attn="eager", hidden_size=16)
    with pytest.raises(ValueError, match="need one width: the student's is 16, the teacher's 32"):
        run_of(tmp_path, narrow, teacher)
    for family, task, kind in (("bert", "tokens", "tokens"), ("llama", "clm", "clm"), ("bert", "answers", "answers")):
        student, teacher = pair(family, task, attn="eager")
        with pytest.raises(ValueError, match="it fits sequence classification"):
            run_of(tmp_path, student, teacher, rows(kind=kind))
    student, teacher = pair(attn="eager")
    with pytest.raises(ValueError, match="pass one model, not a SeveralTeachers"):
        run_of(tmp_path, student, [teacher, tiny_model("bert", seed=5)])
    with pytest.raises(ValueError, match="pass one model, not a CachedTeacher"):
        run_of(tmp_path, student, hfc.cache_teacher(teacher, rows(), tmp_path / "cache"))
    with pytest.raises(ValueError, match="sobolev_weight must be above 0"):
        hfc.InputGradients(sobolev_weight=0.0)
