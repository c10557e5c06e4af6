"""Prompt tuning, p-tuning and prefix tuning of student or teacher: positions are compared by the real tokens."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

import hf_compress as hfc
from distillation.data import rows
from distillation.training import config


def prompted(model, kind, task):
    peft = pytest.importorskip("peft")
    prompts = {
        "tuning": peft.PromptTuningConfig,
        "p-tuning": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
    }
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), prompts[kind](task_type=task, num_virtual_tokens=3)).eval()


@pytest.mark.parametrize("kind", ["tuning", "p-tuning", "prefix"])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_positions_of_a_prompted_language_model_are_those_of_the_real_tokens(kind, who, tmp_path):
    """Against logits of both models, cut by hand. The prompt is three tokens long."""
    base = tiny_model("llama", seed=3)
    student, teacher = copy.deepcopy(base), tiny_model("llama", seed=4)
    student = prompted(student, kind, "CAUSAL_LM") if who != "teacher" else student
    teacher = prompted(teacher, kind, "CAUSAL_LM") if who != "student" else teacher
    trainer = hfc.DistillationTrainer(student, config(tmp_path, alpha=0.5, temperature=1.0, hints="4:4"),
                                      teacher_model=teacher, train_dataset=rows(8, kind="clm"))  # fmt: skip
    batch = {name: torch.tensor(rows(4, kind="clm")[name]) for name in ("input_ids", "attention_mask", "labels")}
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        found = trainer.compute_loss(student.eval(), batch)
        (z, h), (t, g) = (
            (out.logits[:, -12:], out.hidden_states[-1][:, -12:])
            for out in (model(**plain, output_hidden_states=True) for model in (student, teacher))
        )
    counted = batch["labels"][:, 1:] != -100
    z, t = z[:, :-1][counted], t[:, :-1][counted]
    task = F.cross_entropy(z, batch["labels"][:, 1:][counted])
    soft = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    mask = batch["attention_mask"].bool()
    hint = (h - g).square().mean(-1)[mask].mean()
    torch.testing.assert_close(found, 0.5 * task + 0.5 * soft + hint, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DistillationTrainer", "TinyBertTrainer", "MiniLMTrainer", "WordLevelTrainer"])
@pytest.mark.parametrize("task", ["tokens", "answers", "classification", "clm"])
def test_prompted_students_learn_every_task_by_inner_layers_too(name, task, tmp_path):
    if (task == "clm") != (name == "WordLevelTrainer") and not (task == "clm" and name == "DistillationTrainer"):
        pytest.skip("language models word by word, classifiers by the others")
    types = {"tokens": "TOKEN_CLS", "answers": "QUESTION_ANS", "classification": "SEQ_CLS", "clm": "CAUSAL_LM"}
    family = "llama" if task == "clm" else "bert"
    teacher = tiny_model(family, task, seed=3)
    student = prompted(tiny_model(family, task, seed=5), "tuning", types[task])
    kind = getattr(hfc, name)
    options = {"intermediate_share": 0.5} if name in ("TinyBertTrainer", "MiniLMTrainer") else {"alpha": 0.5}
    data = rows(8, kind=task)
    start = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    trainer = kind(student, config(tmp_path, kind.config_class, **options), teacher_model=teacher, train_dataset=data)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert any(not torch.equal(p, start[n]) for n, p in student.named_parameters() if n in start)
    assert np.isfinite(trainer.evaluate(data)["eval_loss"])
