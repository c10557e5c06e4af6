"""Teacher assistants: a chain of sizes, each model distilled from the one before.

Mirzadeh et al., 2020, https://arxiv.org/abs/1902.03393: where teacher and student lie far apart, a model between them
learns from the teacher and teaches the student.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.students import make_student
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.training.resume import last_complete_checkpoint

logger = logging.getLogger(__name__)

FINAL = "final"  # the folder of a stage's model, renamed to this when it is whole
Size = Mapping[str, object] | PreTrainedModel


def distil_through_assistants(
    teacher: PreTrainedModel,
    sizes: Sequence[Size],
    args: DistillationConfig,
    *,
    trainer_class: type[DistillationTrainer] = DistillationTrainer,
    **kwargs,
) -> PreTrainedModel:
    """Distil `teacher` into the first of `sizes`, that into the second, and so on; return the last student.

    Stage n trains in `args.output_dir`/stage-n and leaves its model in stage-n/final. Called again, it passes over the
    stages that are finished and goes on within the one that was stopped, from its last checkpoint.

    Args:
        sizes: for each stage what `make_student` takes (`{"num_hidden_layers": 6}`), applied to the model before, or a
            model of your own.
        args: of every stage; output_dir is that of the chain.
        kwargs: what the trainer takes: train_dataset, eval_dataset, processing_class, ...

    Raises ValueError, before any training, for a chain in which a model is not smaller than the one before, and for an
    output_dir whose stages have other sizes.
    """
    if not sizes:
        raise ValueError("sizes is empty: name at least one student, such as {'num_hidden_layers': 3}.")
    folder = Path(args.output_dir)
    _check(teacher, sizes, folder)
    model = teacher
    for number, size in enumerate(sizes, start=1):
        stage, student = folder / f"stage-{number}", _made(model, size)
        if (stage / FINAL).is_dir():
            logger.info("Stage %d of %d is finished: reading %s.", number, len(sizes), stage / FINAL)
            model = type(student).from_pretrained(stage / FINAL, dtype=student.dtype)
        else:
            model = _train(stage, model, student, args, trainer_class, kwargs)
    return model


def _made(teacher: PreTrainedModel, size: Size) -> PreTrainedModel:
    return size if isinstance(size, nn.Module) else make_student(teacher, **size)


def _check(teacher: PreTrainedModel, sizes: Sequence[Size], folder: Path) -> None:
    model = teacher
    for number, size in enumerate(sizes, start=1):
        smaller = _made(model, size)
        if smaller.num_parameters() >= model.num_parameters():
            raise ValueError(
                f"Each student must be smaller than its teacher: number {number} has {smaller.num_parameters()} "
                f"parameters, the model before it {model.num_parameters()}. Give it fewer layers or less width, or "
                "leave it out."
            )
        final = folder / f"stage-{number}" / FINAL
        if final.is_dir():
            found = type(smaller.config).from_pretrained(final).to_dict()
            sizes_of = {n: v for n, v in smaller.config.to_dict().items() if type(v) is int}
            if changed := [name for name, value in sizes_of.items() if found.get(name) != value]:
                raise ValueError(
                    f"{final} holds a model with {changed[0]}={found.get(changed[0])}, but stage {number} now asks for "
                    f"{sizes_of[changed[0]]}. Choose another output_dir, or delete the stage."
                )
        model = smaller


def _train(
    stage: Path,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    args: DistillationConfig,
    trainer_class: type[DistillationTrainer],
    options: Mapping[str, object],
) -> PreTrainedModel:
    args = copy.copy(args)
    args.output_dir = str(stage)
    trainer = trainer_class(student, args, teacher_model=teacher, **options)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(stage))
    beside = stage / f".{FINAL}"
    trainer.save_model(str(beside))
    if trainer.is_world_process_zero():
        beside.rename(stage / FINAL)  # whole, or not there
    trainer.accelerator.wait_for_everyone()
    return trainer.model
