"""Every task that a model may have: which rows count, in what, and what is compared with the teacher's."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from torch import nn
from transformers import (
    AutoConfig,
    BartForSequenceClassification,
    BertForMultipleChoice,
    BertForPreTraining,
    BertModel,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import hf_compress as hfc
from distillation.data import rows
from distillation.training import config, pair
from hf_compress.distillation.students import make_student
from hf_compress.model.tasks import Task

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)


def quiet_pair(task=None, **changes):
    teacher = tiny_model("bert", task, seed=3, **NO_DROPOUT, **changes)
    return make_student(teacher, num_hidden_layers=2), teacher


def trained(folder, student, teacher, data, *, kind=hfc.DistillationTrainer, **options):
    args = config(folder, kind.config_class, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
                  **{"max_steps": 1, **options})  # fmt: skip
    trainer = kind(student, args, teacher_model=teacher, train_dataset=data)
    trainer.train()
    return trainer


def moved(model, start):
    return torch.cat([(p.detach() - q.detach()).flatten() for p, q in zip(model.parameters(), start.parameters(),
                                                                         strict=True)])  # fmt: skip


# Labels of one kind


@pytest.mark.parametrize("problem, kind", [("multi_label_classification", "binary"), ("regression", "logits"),
                                           ("single_label_classification", "soft"), (None, "soft")])  # fmt: skip
def test_what_the_teacher_predicts_decides_what_is_compared(problem, kind, tmp_path):
    """The student was loaded with the number of labels only, and the text has none: alpha = 1."""
    teacher = tiny_model("bert", seed=3, num_labels=3, problem_type=problem)
    student = tiny_model("bert", num_labels=3, num_hidden_layers=2)
    trainer = hfc.DistillationTrainer(student, config(tmp_path, alpha=1.0, temperature=1.0), teacher_model=teacher,
                                      train_dataset=rows().remove_columns("labels"))  # fmt: skip
    assert trainer.prediction_kind == kind and student.config.problem_type == problem
    batch = tiny_batch(student)
    with torch.no_grad():
        z, t = student(**batch).logits, teacher(**batch).logits
        found = trainer.compute_loss(student.eval(), batch)
    expected = {
        "binary": F.binary_cross_entropy_with_logits(z, t.sigmoid(), reduction="sum") / 3
        - F.binary_cross_entropy_with_logits(t, t.sigmoid(), reduction="sum") / 3,
        "logits": (z - t).square().sum() / 3,
        "soft": F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="sum"),
    }[kind] / len(z)  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "deberta", "deberta-v2"])
@pytest.mark.parametrize("kind", ["live", "several", "cached", "mutual"])
def test_scores_are_compared_example_by_example_in_whatever_form_they_come(kind, family, tmp_path):
    """DeBERTa gives (B,) with labels and (B, 1) without: the mean square of the B differences, and not of all B * B."""
    student, teacher = (tiny_model(family, seed=seed, num_labels=1) for seed in (0, 3))
    other = tiny_model("bert", seed=3, num_labels=1) if kind == "mutual" else teacher  # a peer that gives (B, 1)
    data = rows(8, kind="regression")
    batch = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = (student(**batch).logits - other(**batch).logits).square().mean().item()
    options = {"teacher_model": teacher}
    if kind == "several":
        options = {"teacher_model": [teacher, copy.deepcopy(teacher)]}
    if kind == "cached":
        options = {"teacher_model": hfc.cache_teacher(teacher, data, tmp_path / "cache")}
    if kind == "mutual":
        options = {"peers": [other]}
    trainer_class = hfc.MutualTrainer if kind == "mutual" else hfc.DistillationTrainer
    args = config(tmp_path, trainer_class.config_class, per_device_eval_batch_size=8)
    trainer = trainer_class(student, args, train_dataset=data, eval_dataset=data, **options)
    assert trainer.evaluate()["eval_soft_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("task", ["tokens", "mlm", "answers", "clm", "choice"])
def test_only_classifiers_are_told_by_the_problem_type_of_their_config(task, problem, tmp_path):
    """A model that was a classifier before it got the head of another task keeps the entry, which nothing reads."""
    kind = {"choice": "classification"}.get(task, task)
    losses, given = [], (problem, None, "single_label_classification")
    for problem_of_student, problem_of_teacher in ((None, None), given[:2], (given[2], given[0])):
        student, teacher = quiet_pair(None if task == "choice" else task)
        data = rows(8, kind=kind)
        if task == "choice":
            data = data.map(lambda row: {n: [row[n], row[n][::-1]] for n in ("input_ids", "attention_mask")})
            student, teacher = (BertForMultipleChoice(model.config) for model in (student, teacher))
            for seed, model in enumerate((student, teacher)):
                torch.manual_seed(seed)
                model.apply(model._init_weights)
        student.config.problem_type, teacher.config.problem_type = problem_of_student, problem_of_teacher
        if task == "choice":
            student.config.num_labels = 1
        args = config(tmp_path, temperature=1.0)
        trainer = hfc.DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data)
        assert trainer.prediction_kind == "soft"
        losses.append(trainer.evaluate()["eval_soft_loss"])
    assert losses[0] > 0 and losses[1:] == losses[:1] * 2


def test_teacher_and_student_of_different_problems_are_refused(tmp_path):
    teachers = [tiny_model("bert", seed=s, num_labels=3, problem_type=p) for s, p in
                ((3, "multi_label_classification"), (4, "single_label_classification"))]  # fmt: skip
    student = tiny_model("bert", num_labels=3, problem_type="regression", num_hidden_layers=2)
    for model, teacher in ((student, teachers[0]), (tiny_model("bert", num_labels=3), teachers)):
        with pytest.raises(ValueError, match="the student has problem_type=.*, the teacher .*_label_classification"):
            hfc.DistillationTrainer(model, config(tmp_path), teacher_model=teacher, train_dataset=rows())


def test_a_new_model_of_model_init_learns_the_kind_as_well(tmp_path):
    teacher = tiny_model("bert", seed=3, num_labels=3, problem_type="multi_label_classification")
    trainer = hfc.DistillationTrainer(args=config(tmp_path, alpha=1.0), teacher_model=teacher, train_dataset=rows(),
                                      model_init=lambda: tiny_model("bert", num_labels=3))  # fmt: skip
    trainer.model = trainer.call_model_init()
    assert trainer.prediction_kind == "binary"


# Rows without a label


def sparse(kind, number=8):
    """Few labels: the first row, then none for a while."""
    data = rows(number, kind=kind, labels=3)
    few = (0, 5, 6)
    if kind == "answers":
        names = ("start_positions", "end_positions")
        return data.map(lambda row, i: {n: row[n] if i in few else 99 for n in names}, with_indices=True)
    blank = (lambda labels: [-100] * len(labels)) if kind == "tokens" else (lambda labels: -100)
    return data.map(lambda row, i: {"labels": row["labels"] if i in few else blank(row["labels"])}, with_indices=True)


@pytest.mark.parametrize("kind", ["classification", "answers", "tokens"])
@pytest.mark.parametrize("accumulation", [2, 8])
def test_few_labels_count_alike_however_the_batch_is_cut(kind, accumulation, tmp_path):
    """The gradient of one step over 8 rows of which 3 have a label: that of their own mean."""
    student, teacher = quiet_pair(None if kind == "classification" else kind, num_labels=3 if kind != "answers" else 2)
    data, found = sparse(kind), []
    for size in (8, 8 // accumulation):
        model = copy.deepcopy(student)
        trained(tmp_path, model, teacher, data, alpha=0.0, per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size)  # fmt: skip
        found.append(moved(model, student))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-5  # sums of float32 in another order
    reference = copy.deepcopy(student)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    reference(**batch).loss.backward()
    gradient = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in reference.parameters()]
    )
    torch.testing.assert_close(found[0], -gradient, rtol=1e-3, atol=1e-6)


TRAINERS = ["DistillationTrainer", "PKDTrainer", "DistilBertTrainer", "FSPTrainer", "RelationalTrainer",
            "BertEmdTrainer", "MiniLMTrainer", "TinyBertTrainer", "TheseusTrainer"]  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("kind", ["classification", "answers"])
def test_a_batch_without_any_label_has_no_task_loss(name, kind, tmp_path):
    student, teacher = quiet_pair(None if kind == "classification" else kind)
    trainer_class = getattr(hfc, name)
    options = {"layer_map": "2"} if name == "PKDTrainer" else {}
    options |= {"intermediate_share": 0.0} if hasattr(trainer_class.config_class, "intermediate_share") else {}
    options |= {} if name == "TheseusTrainer" else {"alpha": 0.5}
    start = copy.deepcopy(student)
    data = sparse(kind).select(range(1, 5))
    trainer = trained(tmp_path, student, teacher, data, kind=trainer_class, per_device_train_batch_size=4, **options)
    losses = next(entry for entry in trainer.state.log_history if "task_loss" in entry)
    assert losses["task_loss"] == 0 and np.isfinite(losses["loss"])
    change = moved(student, start)
    assert change.isfinite().all() and (change.norm() > 0) == (name != "TheseusTrainer")


@pytest.mark.parametrize("kind", ["classification", "answers"])
def test_other_trainers_pass_over_a_batch_without_any_label(kind, tmp_path):
    """As the stock Trainer, whose loss is NaN in the log but whose gradient is 0."""
    model = tiny_model("bert", None if kind == "classification" else kind)
    trainer = OurTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=sparse(kind).select(range(1, 5)))
    assert trainer.train().training_loss == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_counts_worked_out_by_hand():
    ids = torch.ones(4, 6, dtype=torch.long)
    sequence, spans = Task("sequence", False), Task("spans", False)
    inputs = {"input_ids": ids, "labels": torch.tensor([1, -100, 0, -100])}
    assert {k: v.item() for k, v in sequence.count(inputs).items()} == {
        "example": 4, "token": 24, "label": 2, "prediction": 4}  # fmt: skip
    positions = {"start_positions": torch.tensor([0, 6, 9, 5]), "end_positions": torch.tensor([2, 6, 9, 6])}
    assert spans.count({"input_ids": ids, **positions})["label"].item() == 1.5  # 2 starts and 1 end of 4
    choices = {"input_ids": ids.view(2, 2, 6), "labels": torch.tensor([0, -100])}
    assert {k: v.item() for k, v in sequence.count(choices).items()} == {
        "example": 4, "token": 24, "label": 1, "prediction": 2}  # fmt: skip


# Models without one set of logits


def choices(number=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (number, 2, 6), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(),
                              "labels": [i % 2 for i in range(number)]})  # fmt: skip


@pytest.mark.parametrize("name", [n for n in TRAINERS if n != "TheseusTrainer"])
def test_several_choices_are_rows_of_their_own_for_inner_layers(name, tmp_path):
    torch.manual_seed(0)
    teacher = BertForMultipleChoice(tiny_model("bert", **NO_DROPOUT).config).eval()
    student = make_student(teacher, num_hidden_layers=2)
    kind = getattr(hfc, name)
    options = {"hints": "1:2"} if name == "DistillationTrainer" else {"layer_map": "2"} if name == "PKDTrainer" else {}
    losses = []
    for size in (8, 2):
        args = config(tmp_path, kind.config_class, max_steps=1, per_device_train_batch_size=size, learning_rate=0.0,
                      gradient_accumulation_steps=8 // size, **options)  # fmt: skip
        trainer = kind(copy.deepcopy(student), args, teacher_model=teacher, train_dataset=choices())
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert np.isfinite(losses[0]["loss"])
    if name != "RelationalTrainer":  # which compares the examples of a batch
        assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
    if name == "DistillationTrainer":
        batch = {n: torch.tensor(choices()[n]) for n in ("input_ids", "attention_mask")}
        with torch.no_grad():
            h, g = (m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher))
        assert losses[0]["hint_loss"] == pytest.approx((h[1] - g[2]).square().mean().item(), rel=1e-4)


def test_heads_that_give_no_one_set_of_logits_are_refused(tmp_path):
    settings = tiny_model("bert").config
    for student, teacher, message in (
        (
            BertForPreTraining(settings),
            BertForPreTraining(settings),
            "The student is a BertForPreTraining, which predicts",
        ),
        (tiny_model("bert"), BertModel(settings), "The teacher is a BertModel, a model without a head"),
    ):
        with pytest.raises(ValueError, match=message):
            hfc.DistillationTrainer(student, config(tmp_path), teacher_model=teacher, train_dataset=rows())


@pytest.mark.parametrize("name", ["DistillationTrainer", "TinyBertTrainer", "MiniLMTrainer"])
def test_a_teacher_without_a_head_teaches_inner_layers(name, tmp_path):
    teacher = BertModel(tiny_model("bert", seed=3).config).eval()
    options = {"alpha": 0.0, "hints": "2:4"} if name == "DistillationTrainer" else {"intermediate_share": 1.0}
    student = tiny_model("bert", num_hidden_layers=2)
    trainer = trained(tmp_path, student, teacher, rows(8), kind=getattr(hfc, name), **options)
    assert np.isfinite(trainer.evaluate(rows(8))["eval_loss"])


def test_models_whose_config_asks_for_tuples_are_read_by_name(tmp_path):
    student, teacher = pair()
    expected = trained(tmp_path, copy.deepcopy(student), teacher, rows(8), hints="1:2").state.log_history[0]["loss"]
    student.config.return_dict = teacher.config.return_dict = False
    assert trained(tmp_path, student, teacher, rows(8), hints="1:2").state.log_history[0]["loss"] == expected


class Own(nn.Module):
    """A model of the user's own: what it gives has the shape that `Trainer` reads, and not the names."""

    def __init__(self, form, model):
        super().__init__()
        self.form, self.model = form, model

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if self.form == "dict":
            return {"scores": outputs.logits, **({} if labels is None else {"loss": outputs.loss})}
        return tuple(outputs.values()) if labels is not None or self.form == "tuple" else outputs.logits


@pytest.mark.parametrize("form", ["tuple", "dict", "bare"])
def test_models_of_ones_own_are_read_as_trainer_reads_them(form, tmp_path):
    """What they predict and how they move is that of the model within, as student, as teacher and as both."""
    student, teacher = pair()
    expected = trained(tmp_path, copy.deepcopy(student), teacher, rows(8))
    for mine, theirs in ((Own(form, student), teacher), (student, Own(form, teacher)),
                         (Own(form, student), Own(form, teacher))):  # fmt: skip
        found = trained(tmp_path, copy.deepcopy(mine), theirs, rows(8))
        assert torch.equal(moved(found.model, mine), moved(expected.model, student))
        assert found.evaluate(rows(8))["eval_loss"] == expected.evaluate(rows(8))["eval_loss"]
        np.testing.assert_array_equal(found.predict(rows(8)).predictions, expected.predict(rows(8)).predictions)


class Line(nn.Module):
    """One number for each example, (B,)."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a)))

    def forward(self, input_x, labels=None):
        y = self.a * input_x
        return (y,) if labels is None else (((y - labels) ** 2).mean(), y, y + 1)


@pytest.mark.parametrize("teachers", [[3.0], [1.0, 5.0]])
def test_one_number_for_each_example_is_compared_as_a_number(teachers, tmp_path):
    """By hand: x is 1 and 2, the labels 0 and 2, a student a = 0 and a teacher (or the mean of two) a = 3."""
    data = [{"input_x": torch.tensor(1.0), "labels": 0.0}, {"input_x": torch.tensor(2.0), "labels": 2.0}]
    models = [Line(a) for a in teachers]
    trainer = trained(tmp_path, Line(0.0), models if len(models) > 1 else models[0], data, alpha=0.25,
                      per_device_train_batch_size=2)  # fmt: skip
    task, soft = (0 + 4) / 2, (9 + 36) / 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.75 * task + 0.25 * soft)
    # d/da of the task: mean of 2 (a x - y) x = -4; of the teacher: mean of 2 (a - 3) x^2 = -15
    assert float(trainer.model.a.detach()) == pytest.approx(0.75 * 4 + 0.25 * 15)
    first, second = trainer.predict(data).predictions
    np.testing.assert_allclose(second, first + 1)


class NoLoss(Line):
    """Takes labels, and says nothing of them."""

    def forward(self, input_x, labels=None):
        return (torch.stack([self.a * input_x, -input_x], dim=-1),)


def test_logits_are_no_loss_of_a_model_that_has_none(tmp_path):
    data = [{"input_x": torch.tensor(float(i)), "labels": i % 2} for i in range(4)]
    assert np.isfinite(trained(tmp_path, NoLoss(0.0), NoLoss(1.0), data, alpha=1.0).state.log_history[0]["loss"])
    with pytest.raises(ValueError, match="mixes in the task loss, but the model gives no loss"):
        trained(tmp_path, NoLoss(0.0), NoLoss(1.0), data, alpha=0.5)


class Words(nn.Module):
    def forward(self, input_ids=None, labels=None):
        return "positive"


def test_an_output_that_nobody_can_read_is_told_what_is_expected(tmp_path):
    with pytest.raises(TypeError, match="The forward of Words returned a str; expected a ModelOutput"):
        trained(tmp_path, tiny_model("bert"), Words(), rows(8))


# Encoder-decoders that classify


def classifier(kind):
    torch.manual_seed(0)
    if kind == "bart":
        return BartForSequenceClassification(tiny_model("bart", num_labels=2).config).eval()
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=64)
    special = dict(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return T5ForSequenceClassification(AutoConfig.for_model("t5", **sizes, **special)).eval()


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize(
    "name", ["DistillationTrainer", "DistilBertTrainer", "RelationalTrainer", "WeightPruningTrainer"]
)
def test_encoder_decoders_that_classify_train_and_predict(kind, name, tmp_path):
    teacher = classifier(kind)
    student = make_student(teacher, num_hidden_layers=1)
    data = rows(8).map(lambda row: {"input_ids": [*row["input_ids"][:3], 2, *[5] * 8], "attention_mask": [1] * 12})
    trainer_class = getattr(hfc, name)
    extra = {} if name == "WeightPruningTrainer" else {"teacher_model": teacher}
    options = {"hints": "1:1,3:4"} if name == "DistillationTrainer" else {}
    trainer = trainer_class(
        student, config(tmp_path, trainer_class.config_class, **options), train_dataset=data, **extra
    )
    trainer.train()
    assert np.isfinite(trainer.evaluate(data)["eval_loss"])
    predictions = trainer.predict(data).predictions
    assert (predictions[0] if isinstance(predictions, tuple) else predictions).shape == (8, 2)


# Predictions


@pytest.mark.parametrize("case", ["seq2seq", "classification", "answers", "hidden"])
def test_predictions_are_those_of_the_stock_trainer(case, tmp_path):
    family, task = ("bart", "seq2seq") if case == "seq2seq" else ("bert", None if case == "hidden" else case)
    student, teacher = pair(family, task)
    student.config.output_hidden_states = case == "hidden"
    data = rows(6, kind="classification" if case == "hidden" else case)
    stock = Trainer(student, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True))
    ours = hfc.DistilBertTrainer(student, config(tmp_path, hfc.DistilBertConfig), teacher_model=teacher)
    expected, found = stock.predict(data).predictions, ours.predict(data).predictions
    assert type(found) is type(expected)

    def compare(mine, theirs):
        if isinstance(theirs, tuple):
            assert len(mine) == len(theirs)
            return [compare(*one) for one in zip(mine, theirs, strict=True)]
        return np.testing.assert_allclose(mine, theirs, atol=1e-5)

    compare(found, expected)
