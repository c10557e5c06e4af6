"""Distilling into an adapter; the teacher is the same base weights with another adapter, or with none."""

import copy

import pytest
import torch
from helpers import tiny_model

from distillation.data import rows
from distillation.test_trainer import config, pair
from hf_compress.distillation.teachers.adapter_teacher import AdapterTeacher
from hf_compress.distillation.trainer import DistillationTrainer

peft = pytest.importorskip("peft")


def with_adapters(rank=4):
    """A base with two adapters that differ, `teacher` and `student`, of which the second is active."""
    torch.manual_seed(0)
    options = dict(r=rank, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.5)
    model = peft.get_peft_model(tiny_model("bert", seed=3), peft.LoraConfig(**options), adapter_name="teacher")
    model.add_adapter("student", peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "teacher" in name or "student" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_adapter("student")
    return model


def batch():
    return {name: torch.tensor(rows(8)[name]) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("adapter", ["teacher", None])
def test_it_is_the_base_with_that_adapter(adapter):
    model = with_adapters().train()
    expected = copy.deepcopy(model).eval()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    modes = [module.training for module in model.modules()]
    teacher = AdapterTeacher(model, adapter)
    with torch.no_grad():
        logits = teacher(**batch()).logits
        if adapter is None:
            with expected.disable_adapter():
                torch.testing.assert_close(logits, expected(**batch()).logits)
        else:
            expected.set_adapter(adapter)
            torch.testing.assert_close(logits, expected(**batch()).logits)
        expected.set_adapter("student")
        assert (logits - expected(**batch()).logits).abs().max() > 1e-3
        torch.testing.assert_close(model.eval()(**batch()).logits, expected(**batch()).logits)
    model.train()
    assert model.active_adapters == ["student"] and modes == [module.training for module in model.modules()]
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("student" in name for name in trainable)
    assert {p.data_ptr() for p in teacher.parameters()} <= {p.data_ptr() for p in model.parameters()}


def test_the_student_learns_and_the_teacher_stays(tmp_path):
    """The losses are those of a copy of the teacher, hidden states included; only the student's adapter moves."""
    logs = []
    for live in (True, False):
        model = with_adapters()
        before = {name: p.clone() for name, p in model.named_parameters()}
        teacher = AdapterTeacher(model, "teacher")
        if live:
            teacher = copy.deepcopy(model)
            teacher.set_adapter("teacher")
            teacher = teacher.merge_and_unload()
        args = config(tmp_path, hints="2:2", max_steps=4, gradient_accumulation_steps=2)
        torch.manual_seed(7)
        trainer = DistillationTrainer(model, args, teacher_model=teacher, train_dataset=rows(), eval_dataset=rows(8))
        trainer.train()
        logs.append([*trainer.state.log_history[:4], trainer.evaluate()])
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved and all("student" in name for name in moved)
    for mine, theirs in zip(*logs, strict=True):
        for name in [name for name in mine if "loss" in name]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_what_is_no_other_adapter_is_refused(tmp_path):
    student, teacher = pair()
    model = with_adapters()
    with pytest.raises(ValueError, match="needs a PEFT model, got BertFor"):
        AdapterTeacher(teacher, "teacher")
    with pytest.raises(ValueError, match=r"has no adapter 'other', only \['student', 'teacher'\]"):
        AdapterTeacher(model, "other")
    with pytest.raises(ValueError, match="'student' is the one that is trained"):
        AdapterTeacher(model, "student")
    prompts = peft.get_peft_model(student, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="these learn prompts"):
        AdapterTeacher(prompts)
    with pytest.raises(ValueError, match="must be one PEFT model, but the student is another"):
        DistillationTrainer(pair()[0], config(tmp_path), teacher_model=AdapterTeacher(model, "teacher"))
    one = AdapterTeacher(model, "teacher")
    model.set_adapter("teacher")
    with pytest.raises(ValueError, match="the teacher would change while the student"):
        DistillationTrainer(model, config(tmp_path), teacher_model=one)


def test_a_checkpoint_holds_adapters_and_is_resumed(tmp_path):
    """No base weights are saved, and a run that goes on ends where one that never stopped does."""
    finals = []
    for name, step in (("whole", None), ("stopped", "checkpoint-2")):
        model = with_adapters()
        args = config(tmp_path / name, hints="2:2", max_steps=4, save_strategy="steps", save_steps=2)
        trainer = DistillationTrainer(model, args, teacher_model=AdapterTeacher(model, "teacher"), train_dataset=rows())
        trainer.train(resume_from_checkpoint=step and str(tmp_path / "whole" / step))
        finals.append(dict(model.named_parameters()))
    for name, parameter in finals[0].items():
        assert torch.equal(parameter, finals[1][name]), name
    saved = {file.name for file in (tmp_path / "whole" / "checkpoint-4").rglob("*.safetensors")}
    assert saved == {"adapter_model.safetensors"}
