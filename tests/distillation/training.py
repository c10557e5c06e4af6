"""Short runs of distillation trainers on tiny models."""

import torch
from helpers import tiny_model
from torch import nn

from distillation.data import rows
from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.students import make_student
from hf_compress.distillation.trainer import DistillationTrainer


def config(folder, kind=DistillationConfig, **options):
    defaults = dict(use_cpu=True, max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                    save_strategy="no", disable_tqdm=True, learning_rate=1e-3)  # fmt: skip
    return kind(str(folder), **{**defaults, **options})


def pair(family="bert", task=None, **changes):
    teacher = tiny_model(family, task, seed=3, **changes)
    return make_student(teacher, num_hidden_layers=1 if family == "bart" else 2), teacher


def trainer_of(kind, folder, student=None, teacher=None, data=None, **options):
    """A trainer that trains and evaluates on the same rows."""
    own_student, own_teacher = pair()
    data = rows() if data is None else data
    return kind(
        student or own_student, config(folder, kind.config_class, **options), teacher_model=teacher or own_teacher,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(kind, accumulation, folder, trainer_class=DistillationTrainer, hidden_size=16, **options):
    """The gradient of one optimiser step over 8 examples, cut into micro-batches."""
    family, task = ("llama", "clm") if kind == "clm" else ("bert", "tokens" if kind == "tokens" else "classification")
    teacher = tiny_model(family, task, seed=3, num_labels=3)
    student = make_student(teacher, num_hidden_layers=2, hidden_size=hidden_size)
    for module in [m for m in student.modules() if isinstance(m, nn.Dropout)]:
        module.p = 0.0
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        for module in student.modules():
            if hasattr(module, name):
                setattr(module, name, 0.0)
    args = config(folder, trainer_class.config_class, max_steps=1, per_device_train_batch_size=8 // accumulation,
                  gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, seed=5,
                  **options)  # fmt: skip
    torch.manual_seed(7)  # of the projections
    trainer = trainer_class(student, args, teacher_model=teacher, train_dataset=rows(8, kind=kind, labels=3))
    projections = dict(trainer.training_state.named_parameters())
    named = {**dict(student.named_parameters()), **{f"projection.{n}": p for n, p in projections.items()}}
    before = {n: p.detach().clone() for n, p in named.items()}
    torch.manual_seed(0)
    trainer.train()
    return torch.cat([(p.detach() - before[n]).flatten().double() for n, p in named.items()])


def assert_gradient_is_the_same_however_cut(folder, trainer_class, kind="classification", accumulation=4, **options):
    whole = gradient(kind, 1, folder, trainer_class, **options)
    cut = gradient(kind, accumulation, folder, trainer_class, **options)
    assert whole.norm() > 0
    assert (whole - cut).norm() / whole.norm() < 1e-5


def padded(data, extra=8):
    """The same rows with `extra` more columns of padding."""
    return data.map(lambda r: {n: r[n] + [0] * extra for n in ("input_ids", "attention_mask")})
