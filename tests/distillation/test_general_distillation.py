"""TinyBERT's general distillation: inner layers alone, on text without labels, for models without a head."""

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModel

from distillation.data import rows
from hf_compress.distillation.methods.tinybert import TinyBertConfig, TinyBertTrainer
from hf_compress.distillation.students import make_student


@pytest.mark.parametrize("kind", ["base", "masked language model"])
def test_plain_text_teaches_a_model_without_labels(kind, tmp_path):
    task = tiny_model("bert", "mlm", seed=3)
    folder = tmp_path / "teacher"
    teacher = task.bert if kind == "base" else task
    teacher.save_pretrained(folder)
    student = make_student(teacher, num_hidden_layers=2, hidden_size=16)
    args = TinyBertConfig(str(tmp_path), use_cpu=True, max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2,
                          intermediate_share=1.0, eval_strategy="steps", eval_steps=3, report_to="none",
                          save_strategy="no", disable_tqdm=True)  # fmt: skip
    text = rows().remove_columns("labels")
    trainer = TinyBertTrainer(student, args, teacher_model=folder, train_dataset=text, eval_dataset=text)
    assert type(trainer.teacher) is type(teacher)  # loaded by its folder
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    for name in ("eval_loss", "eval_embedding_loss", "eval_hidden_state_loss", "eval_attention_loss"):
        assert end[name] < start[name]
    assert "eval_soft_loss" not in end and "eval_task_loss" not in end
    if kind == "base":
        trainer.save_model(tmp_path / "student")
        again = AutoModel.from_pretrained(tmp_path / "student")
        torch.testing.assert_close(again.state_dict(), trainer.model.state_dict())
