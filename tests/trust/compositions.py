"""What a user puts together of students, teachers and callbacks, as cases beside the trainers themselves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import concatenate_datasets
from distillation.data import rows
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

import hf_compress as hfc

QUICK = {"begin": 0.0, "end": 0.8, "num_updates": 3}


@dataclass(frozen=True)
class Composition:
    """A trainer by name, and what differs from how `trainers.build` makes it."""

    trainer: str
    options: dict[str, object] = field(default_factory=dict)
    student: Callable[[nn.Module], nn.Module] = lambda student: student
    teacher: Callable[[nn.Module, nn.Module, Path], object] = lambda teacher, student, folder: teacher
    callbacks: Callable[[], list[TrainerCallback]] = list


def random_again(student: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    return type(student)(student.config).eval()


def with_adapter(student: nn.Module) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    return get_peft_model(student, config)


def cached(teacher: nn.Module, student: nn.Module, folder: Path) -> object:
    """Of all rows that `trainers.build` trains and evaluates on. Beside the folder, so that a kill leaves it whole."""
    data = concatenate_datasets([rows(), rows(8, seed=1)])
    return hfc.cache_teacher(teacher, data, folder.parent / f"cache-of-{folder.name}", hidden_states=[2, 4])


def rewound() -> list[TrainerCallback]:
    pruning = hfc.WeightPruning(0.5, begin=0.25, end=0.5, num_updates=2)
    return [pruning, hfc.Rewinding(pruning, 0.25)]


COMPOSITIONS = {
    "several-teachers": Composition(
        "DistillationTrainer", {"hints": None, "teacher_weights": [0.7, 0.3]},
        teacher=lambda teacher, student, folder: [teacher, tiny_model("bert", seed=4)],
    ),
    "cached-teacher": Composition("DistillationTrainer", teacher=cached),
    "relations-from-scratch": Composition("MiniLMTrainer", student=random_again),
    "adapter": Composition("DistillationTrainer", student=with_adapter),
    "adapter-taught-by-its-base": Composition(
        "DistillationTrainer", {"hints": None}, student=with_adapter,
        teacher=lambda teacher, student, folder: hfc.AdapterTeacher(student),
    ),
    "pruned-in-four-ways": Composition(
        "PKDTrainer",
        callbacks=lambda: [hfc.HeadPruning(0.4, **QUICK), hfc.NeuronPruning(0.5, **QUICK), hfc.LayerPruning(0.3),
                           hfc.BlockPruning(0.5, block_size=8, group_lasso=0.1, **QUICK)],
    ),
    "distilled-pruned-quantized": Composition(
        "TinyBertTrainer", student=lambda student: hfc.prepare_qat(student, 2),
        callbacks=lambda: [hfc.QuantizationAware(refresh_steps=2, start_bits=8, lowering_ratio=0.8),
                           hfc.HeadPruning(0.4, **QUICK), hfc.WeightPruning(0.5, method="movement", **QUICK)],
    ),
    "peers-with-gates": Composition("MutualTrainer", callbacks=lambda: [hfc.HeadGates(1.0)]),
    "word-level-wanda": Composition(
        "WordLevelTrainer", callbacks=lambda: [hfc.WeightPruning(0.5, method="wanda", proximal=1e-3, **QUICK)],
    ),
    "dense-sparse-dense": Composition(
        "DistillationTrainer",
        callbacks=lambda: [hfc.WeightPruning(0.6, begin=0.0, end=0.5, num_updates=2, regrow=0.8)],
    ),
    "rewound": Composition("DistillationTrainer", callbacks=rewound),
    "ranks-by-gates": Composition(
        "PKDTrainer", student=lambda student: hfc.factorise(student, rank=8),
        callbacks=lambda: [hfc.RankGates(0.5, multiplier_rate=300.0)],
    ),
    "bits-fall-to-two": Composition("QBertTrainer", {"average_bits": 2, "start_bits": 8, "lowering_ratio": 1.0}),
    "bits-by-sensitivity": Composition("QBertTrainer", {"average_bits": 3.5, "sensitivity_examples": 8}),
    "learned-steps": Composition("QBertTrainer", {"learned_steps": True}),
}  # fmt: skip
