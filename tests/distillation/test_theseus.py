"""BERT-of-Theseus: layers of teacher and student run as one model, and the student is left alone in the end."""

import copy

import pytest
import torch
from helpers import tiny_model
from torch import nn

from distillation.data import rows
from distillation.test_trainer import config, pair
from hf_compress.distillation.methods.theseus import TheseusConfig, TheseusTrainer, stand_ins
from hf_compress.distillation.students import make_student
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.model.anatomy import anatomy


def test_the_mixture_is_the_model_with_those_layers():
    """Logits and gradients in float64 are those of a model built of the same layers, one list."""
    student, teacher = (model.double() for model in pair())
    for parameter in student.bert.encoder.layer.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = {name: torch.tensor(rows(5)[name]) for name in ("input_ids", "attention_mask", "labels")}
    for replaced in ([False, False], [True, False], [False, True], [True, True]):
        mixed = copy.deepcopy(student)
        own, old = mixed.bert.encoder.layer, copy.deepcopy(teacher).bert.encoder.layer
        layers = [[own[i]] if replaced[i] else [old[2 * i], old[2 * i + 1]] for i in range(2)]
        mixed.bert.encoder.layer = nn.ModuleList(sum(layers, []))
        expected = mixed(**batch)
        expected.loss.backward()
        student.zero_grad()
        with stand_ins(student, teacher.requires_grad_(False), torch.tensor(replaced)):
            outputs = student(**batch)
            outputs.loss.backward()
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(student.bert.encoder.layer, own, strict=True):
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(student.bert.embeddings.word_embeddings.weight.grad,
                                   mixed.bert.embeddings.word_embeddings.weight.grad)  # fmt: skip
    with torch.no_grad(), stand_ins(student, teacher, torch.tensor([False, False])):
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits)
    assert all("forward" not in layer.__dict__ for layer in student.bert.encoder.layer)


def test_the_rate_rises_to_one_and_then_everything_learns(tmp_path):
    student, teacher = pair()
    before = {n: p.clone() for n, p in [*teacher.named_parameters(), *student.named_parameters()]}
    args = config(tmp_path, TheseusConfig, max_steps=8, intermediate_share=0.5, replacing_rate=0.4, weight_decay=0.1)
    trainer = TheseusTrainer(student, args, teacher_model=teacher, train_dataset=rows())
    rates, moved = [], []
    step = trainer.training_step

    def watched(*inputs):
        rates.append(trainer.rate)
        moved.append(not torch.equal(student.bert.embeddings.word_embeddings.weight, start))
        return step(*inputs)

    start = student.bert.embeddings.word_embeddings.weight.clone()
    trainer.training_step = watched
    trainer.train()
    assert rates == pytest.approx([0.4, 0.6, 0.8, 1.0, 1, 1, 1, 1])
    assert moved == [False] * 5 + [True] * 3  # seen before a step
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters() if "layer.3" in n)
    assert not torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, before["bert.encoder.layer.1.output.dense.weight"]
    )
    assert (
        trainer.state.log_history[0].keys() >= {"loss", "task_loss"} and "soft_loss" not in trainer.state.log_history[0]
    )


def test_it_learns_and_evaluates_the_student_alone(tmp_path):
    student, teacher = pair()
    args = config(tmp_path, TheseusConfig, max_steps=10, learning_rate=3e-3, gradient_checkpointing=True)
    trainer = TheseusTrainer(student, args, teacher_model=teacher, train_dataset=rows(), eval_dataset=rows(8))
    batch = {name: torch.tensor(rows(8)[name]) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert trainer.evaluate()["eval_task_loss"] == pytest.approx(student.eval()(**batch).loss.item(), rel=1e-5)
    before = trainer.evaluate(rows())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows())["eval_loss"] < before


def test_llama_layers_are_replaced_too(tmp_path):
    student, teacher = pair("llama")
    args = config(tmp_path, TheseusConfig)
    TheseusTrainer(student, args, teacher_model=teacher, train_dataset=rows(kind="clm")).train()
    assert len(anatomy(student).layers) == 2


def test_what_cannot_be_replaced_is_refused(tmp_path):
    student, teacher = pair()

    def trainer(student=student, teacher=teacher):
        return TheseusTrainer(student, config(tmp_path, TheseusConfig), teacher_model=teacher, train_dataset=rows(8))

    with pytest.raises(ValueError, match="the student's is 16, the teacher's 32"):
        trainer(make_student(teacher, num_hidden_layers=2, hidden_size=16))
    with pytest.raises(ValueError, match="it has 4 layers, the teacher 4"):
        trainer(make_student(teacher))
    with pytest.raises(ValueError, match=r"\['BertLayer', 'RobertaLayer'\]"):
        trainer(tiny_model("roberta", "classification", num_hidden_layers=2))
    with pytest.raises(ValueError, match="pass one teacher, not a cache"):
        trainer(teacher=cache_teacher(teacher, rows(8), tmp_path / "cache"))
    with pytest.raises(ValueError, match="is a probability, 0 to 1, got 1.5"):
        TheseusConfig(str(tmp_path), replacing_rate=1.5)
    with pytest.raises(ValueError, match="learns from the task loss alone"):
        TheseusConfig(str(tmp_path), alpha=0.5)
