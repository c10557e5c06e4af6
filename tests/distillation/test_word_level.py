"""Word-level losses in chunks are those of the whole logits, gradients included."""

import math
from functools import partial

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch import nn

from distillation.data import rows
from hf_compress.distillation.heads import output_head
from hf_compress.distillation.losses.chunked_head import fused_forward_kl, head_losses
from hf_compress.distillation.losses.divergences import forward_kl, jensen_shannon, reverse_kl, top_k_forward_kl
from hf_compress.distillation.methods.word_level import WordLevelConfig, WordLevelTrainer, _check_logits
from hf_compress.distillation.students import make_student
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.trainer import DistillationTrainer

DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen-shannon": partial(jensen_shannon, beta=0.3)}


def distance(kind, student, teacher):
    """The sum over rows of a divergence of logits, from its equation."""
    p_s, p_t = (z.exp() / z.exp().sum(-1, keepdim=True) for z in (student, teacher))

    def kl(p, q):
        return (p * (p / q).log()).sum()

    if kind == "jensen-shannon":
        m = 0.3 * p_t + 0.7 * p_s
        return 0.3 * kl(p_t, m) + 0.7 * kl(p_s, m)
    return kl(p_t, p_s) if kind == "forward" else kl(p_s, p_t)


def problem(student_classes=11, teacher_classes=11, positions=7, bias=True):
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(5, student_classes, bias=bias).double(), nn.Linear(6, teacher_classes).double()
    states = torch.randn(positions, 5, dtype=torch.float64, requires_grad=True)
    teacher_states = 2 * torch.randn(positions, 6, dtype=torch.float64)
    return states, head, teacher_states, teacher_head, torch.randint(0, 9, (positions,))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(
    ("mine", "theirs"), [(11, 11), (11, 9), (9, 11)], ids=["equal", "student-padded", "teacher-padded"]
)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_losses_and_gradients_are_those_of_the_equations(kind, mine, theirs, chunk_size, temperature):
    states, head, teacher_states, teacher_head, labels = problem(mine, theirs)
    options = dict(temperature=temperature, task_weight=0.4, soft_weight=0.6, chunk_size=chunk_size)
    total, task, soft = head_losses(states, head, [teacher_states], teacher_head, labels, DIVERGENCES[kind], **options)
    gradients = torch.autograd.grad(3 * total, [states, head.weight, head.bias])

    logits, teacher_logits = head(states), teacher_head(teacher_states)
    expected_soft = temperature**2 * distance(kind, logits[:, :9] / temperature, teacher_logits[:, :9] / temperature)
    if mine == theirs == 11:
        expected_soft = temperature**2 * distance(kind, logits / temperature, teacher_logits / temperature)
    expected_task = -logits.log_softmax(-1)[torch.arange(7), labels].sum()
    expected_total = 0.4 * expected_task + 0.6 * expected_soft
    expected = torch.autograd.grad(3 * expected_total, [states, head.weight, head.bias])
    torch.testing.assert_close([total, task, soft], [expected_total, expected_task, expected_soft])
    torch.testing.assert_close(gradients, expected)


def test_divergences_by_hand():
    even, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert forward_kl(even.clone(), sure.clone())[0].item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert reverse_kl(even.clone(), sure.clone())[0].item() == pytest.approx(0.5 * math.log(4 / 3))
    for divergence in DIVERGENCES.values():
        assert divergence(sure.clone(), sure.clone())[0].item() == pytest.approx(0, abs=1e-7)
    one = jensen_shannon(even.clone(), sure.clone(), beta=0.5)[0]
    assert one.item() == pytest.approx(jensen_shannon(sure.clone(), even.clone(), beta=0.5)[0].item())


def test_logits_of_minus_infinity_have_no_share():
    states, head, teacher_states, teacher_head, _ = problem(bias=True)
    with torch.no_grad():
        teacher_head.bias[3] = -math.inf
    options = dict(temperature=1.0, task_weight=0.0, soft_weight=1.0, chunk_size=4)
    for kind in ("forward", "jensen-shannon"):
        total, *_ = head_losses(states, head, [teacher_states], teacher_head, None, DIVERGENCES[kind], **options)
        assert total.isfinite() and torch.autograd.grad(total, states)[0].isfinite().all()


def test_the_fused_operator_computes_the_same_forward_kl():
    student, teacher = torch.randn(2, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, grad = fused_forward_kl(student, teacher, 1.7)
    expected, of_row = forward_kl(*((z / 1.7).log_softmax(-1) for z in (student, teacher)))
    torch.testing.assert_close(loss, 1.7**2 * expected.sum())
    torch.testing.assert_close(grad, 1.7 * of_row)


@pytest.mark.parametrize("k", [1, 5, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_largest_logits_of_a_cache(k, temperature):
    states, head, teacher_states, teacher_head, labels = problem()
    teacher = 3 * teacher_head(teacher_states).detach()
    top, indices = teacher.topk(k)
    rest = teacher.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    options = dict(temperature=temperature, task_weight=0.4, soft_weight=0.6, chunk_size=3)
    total, task, soft = head_losses(states, head, [top, indices.int(), rest], None, labels, forward_kl, **options)
    gradients = torch.autograd.grad(total, [states, head.weight, head.bias])

    logits = head(states)
    others = logits.detach().scatter(-1, indices, -torch.inf)
    completed = (others + rest - others.logsumexp(-1, keepdim=True)).scatter(-1, indices, top)
    p_t, p_s = (completed / temperature).softmax(-1), (logits / temperature).softmax(-1)
    expected_soft = temperature**2 * (p_t * (p_t / p_s).log()).sum()
    expected_task = -logits.log_softmax(-1)[torch.arange(7), labels].sum()
    expected = torch.autograd.grad(0.4 * expected_task + 0.6 * expected_soft, [states, head.weight, head.bias])
    torch.testing.assert_close([task, soft], [expected_task, expected_soft], check_dtype=False)
    # `complete` works in float32
    torch.testing.assert_close(gradients, expected, **({} if temperature == 1 else dict(rtol=1e-4, atol=1e-5)))


def test_the_rest_may_be_smaller_than_rounding():
    """The student is sure of what the teacher doubts a little, and the other way round."""
    student = torch.tensor([[40.0, 0.0, 0.0], [0.0, 0.0, 40.0]])
    log_student = student.log_softmax(-1)
    teacher = torch.tensor([[0.0], [0.0]]), torch.tensor([[0], [0]]), torch.tensor([[-20.0], [-1e30]])
    distance, grad = top_k_forward_kl(log_student, *teacher)
    r = math.exp(-20)
    assert distance.tolist() == pytest.approx([r * (-20 + 40 - math.log(2)), 40], rel=1e-3, abs=1e-8)
    torch.testing.assert_close(grad[:, 1:], torch.tensor([[-r / 2, -r / 2], [0.0, 1.0]]), rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(("family", "task", "kd"), [("llama", None, "clm"), ("bert", "mlm", "mlm")])
@pytest.mark.parametrize("top_k", [None, 8])
def test_training_from_a_cache_is_that_of_the_plain_trainer(family, task, kd, top_k, tmp_path):
    teacher, data = tiny_model(family, task, seed=3), rows(kind=kd)
    cached = cache_teacher(teacher, data, tmp_path / "cache", top_k=top_k)
    logs = []
    for kind in (WordLevelTrainer, DistillationTrainer):
        student = make_student(tiny_model(family, task, seed=3), num_hidden_layers=1, hidden_size=16)
        args = config(tmp_path, kind.config_class, temperature=1.0, alpha=0.7)
        trainer = kind(student, args, teacher_model=cached, train_dataset=data)
        trainer.train()
        logs.append([entry[name] for entry in trainer.state.log_history[:-1] for name in ("soft_loss", "task_loss")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    if top_k:
        with pytest.raises(ValueError, match="holds the 8 largest. Use divergence"):
            args = config(tmp_path, divergence="reverse")
            WordLevelTrainer(student, args, teacher_model=cached, train_dataset=data)


def test_mixed_precision_and_a_head_without_bias():
    states, head, teacher_states, teacher_head, labels = problem(bias=False)
    states, teacher_states = states.detach().float().requires_grad_(), teacher_states.float()
    head.float(), teacher_head.float()
    options = dict(temperature=1.0, task_weight=0.5, soft_weight=0.5, chunk_size=3)
    arguments = states, head, [teacher_states], teacher_head, labels, forward_kl
    exact = head_losses(*arguments, **options)
    exact_grads = torch.autograd.grad(exact.total, [states, head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        low = head_losses(*arguments, **options)
    low_grads = torch.autograd.grad(low.total, [states, head.weight])
    assert low.total.dtype == torch.float32 and low_grads[1].dtype == torch.float32
    torch.testing.assert_close(low.total, exact.total, rtol=1e-2, atol=0)  # bfloat16 has 3 digits
    torch.testing.assert_close(low_grads, exact_grads, rtol=5e-2, atol=5e-2)


def config(folder, kind=WordLevelConfig, **options):
    defaults = dict(use_cpu=True, max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none")
    optimiser = dict(optim="sgd", learning_rate=0.5, max_grad_norm=0.0)
    quiet = dict(save_strategy="no", disable_tqdm=True)
    return kind(str(folder), **{**defaults, **optimiser, **quiet, **options})


def trained(kind, family, folder, task=None, kd=None, teacher_changes=None, **options):
    """Losses and weights after two steps."""
    teacher = tiny_model(family, task, seed=3, **(teacher_changes or {}))
    student = make_student(tiny_model(family, task, seed=3), num_hidden_layers=1, hidden_size=16)
    args = config(folder, kind.config_class, temperature=1.5, alpha=0.7, **options)
    data = rows(kind=kd or "clm")
    trainer = kind(
        student, args, teacher_model=teacher, train_dataset=data, eval_dataset=rows(6, kind=kd or "clm", seed=1)
    )
    trainer.train()
    logs = [{k: v for k, v in entry.items() if k.endswith("loss")} for entry in trainer.state.log_history[:-1]]
    metrics = {k: v for k, v in trainer.evaluate().items() if k.endswith("loss")}
    return logs, metrics, dict(student.named_parameters()), trainer


CASES = [
    ("llama", None, "clm", {}),
    ("llama", None, "clm", dict(chunk_size=5, gradient_accumulation_steps=2, hints="1:2")),
    ("gpt2", None, "clm", dict(chunk_size=1000)),  # tied head
    ("bert", "mlm", "mlm", {}),
    ("bart", None, "seq2seq", {}),
]


@pytest.mark.parametrize(
    ("family", "task", "kd", "options"), CASES, ids=["llama", "llama-parts", "gpt2", "bert-mlm", "bart"]
)
def test_training_is_that_of_the_plain_trainer(family, task, kd, options, tmp_path):
    mine = trained(WordLevelTrainer, family, tmp_path, task, kd, **options)
    plain = {k: v for k, v in options.items() if k != "chunk_size"}
    theirs = trained(DistillationTrainer, family, tmp_path, task, kd, **plain)
    for own, other in zip(mine[0], theirs[0], strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    assert mine[1] == pytest.approx(theirs[1], rel=1e-4)
    for name, parameter in mine[2].items():
        torch.testing.assert_close(parameter, theirs[2][name], rtol=1e-3, atol=1e-5)


def test_a_padded_vocabulary_of_the_teacher_is_left_out(tmp_path):
    mine = trained(WordLevelTrainer, "llama", tmp_path, teacher_changes={"vocab_size": 72})
    theirs = trained(DistillationTrainer, "llama", tmp_path, teacher_changes={"vocab_size": 72})
    assert mine[0][-1] == pytest.approx(theirs[0][-1], rel=1e-4)


def test_padding_and_ignored_positions_never_count(tmp_path):
    *_, trainer = trained(WordLevelTrainer, "llama", tmp_path)
    batch = tiny_batch(trainer.model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 33, batch["input_ids"])}
    losses = [trainer.compute_loss(trainer.model.eval(), b).item() for b in (batch, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 0


def test_the_logits_of_neither_model_are_made(tmp_path):
    *_, trainer = trained(WordLevelTrainer, "llama", tmp_path)
    _, outputs = trainer.compute_loss(
        trainer.model, tiny_batch(trainer.model) | {"labels": torch.ones(3, 10).long()}, True
    )
    assert outputs["logits"].shape == (1, 1, 64)
    assert trainer.predict(rows(5, kind="clm")).predictions.shape == (5, 12, 64)


def test_reverse_and_mixed_divergences_train(tmp_path):
    data, before = rows(kind="clm"), set()
    for divergence in DIVERGENCES:
        teacher = tiny_model("llama", seed=3)
        with torch.no_grad():
            teacher.lm_head.weight.mul_(10)  # far from even
        args = config(tmp_path, alpha=1.0, divergence=divergence, max_steps=6)
        trainer = WordLevelTrainer(tiny_model("llama"), args, teacher_model=teacher, train_dataset=data)
        start = trainer.evaluate(data)["eval_soft_loss"]
        trainer.train()
        assert trainer.evaluate(data)["eval_soft_loss"] < start
        before.add(start)
    assert len(before) == 3


def test_what_cannot_be_chunked_is_refused(tmp_path):
    for options, message in [
        (dict(divergence="kl"), "divergence must be one of"),
        (dict(jensen_shannon_beta=1.0), "between 0 and 1, got 1.0"),
        (dict(chunk_size=0), "1 or more, got 0"),
        (dict(alpha=0.0), "alpha is 0"),
        (dict(teacher_noise=0.1), "never holds all logits"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)
    student, teacher = tiny_model("bert"), tiny_model("bert", seed=1)
    with pytest.raises(ValueError, match="needs language models, got BertForSequenceClassification"):
        WordLevelTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=rows())


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    teacher = tiny_model("gemma3_text", seed=3, final_logit_softcapping=0.5)
    student = make_student(tiny_model("gemma3_text", seed=4), num_hidden_layers=1)
    trainer = WordLevelTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=rows(kind="clm"))
    with pytest.raises(ValueError, match="Gemma3ForCausalLM changes its logits after the head"):
        trainer.train()


def test_logits_of_another_rounding_are_those_of_the_head(monkeypatch):
    """bfloat16 under autocast, and a packed head that rounds the inputs of many tokens alone."""
    model = tiny_model("llama")
    head, states = output_head(model), 5 * torch.randn(2, 6, model.config.hidden_size)
    logits = head(states)
    _check_logits(model, states, logits[:1, :1].bfloat16())
    for changed in (logits.std() * torch.tanh(logits / logits.std()), logits * 0.9, logits + 1, logits.mean(1)):
        with pytest.raises(ValueError, match="changes its logits after the head"):
            _check_logits(model, states, changed[:1, :1] if changed.ndim == 3 else changed)
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda x: plain(x) * (1.05 if x.shape[1] > 1 else 1))
    _check_logits(model, states, head(states))
    _check_logits(model, states, head(states[:1, :1]))


def test_a_batch_without_labels_needs_alpha_1(tmp_path):
    student, teacher = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", seed=1)
    data = rows(kind="clm").remove_columns("labels")
    with pytest.raises(ValueError, match="batch has no labels"):
        WordLevelTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=data).train()
    WordLevelTrainer(student, config(tmp_path, alpha=1.0), teacher_model=teacher, train_dataset=data).train()
