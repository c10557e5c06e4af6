"""Stages that train: each goes on from its trainer's last whole checkpoint, and ends in a saved model."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_compress.distillation.methods.embeddings import EmbeddingDistillationTrainer
from hf_compress.distillation.students import make_student
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.files.whole import discard
from hf_compress.formats.export import export
from hf_compress.formats.runtimes.agreement import TEXTS
from hf_compress.formats.runtimes.folder import RECORD
from hf_compress.measuring.metrics import metric_for
from hf_compress.measuring.quality import example_scores, usable_rows
from hf_compress.model.pooling import copy_pooling
from hf_compress.model.precision import fast_forward
from hf_compress.recipe.data import CLASSIFICATION, RecipeData
from hf_compress.recipe.one_shot import Samples, cast
from hf_compress.recipe.publish import EXPORT
from hf_compress.recipe.qat import QATOptions
from hf_compress.recipe.stages import Stage, StudentOptions
from hf_compress.recipe.tasks.embedding import Embeddings
from hf_compress.training.bar import with_own_bar
from hf_compress.training.resume import last_complete_checkpoint

logger = logging.getLogger(__name__)

GRAPHS = ("openvino", "onnx")  # formats that are run on texts beside the model


@dataclass(frozen=True)
class Work:
    """What a stage is given."""

    folder: Path  # its working folder
    source: str | Path  # the model that enters
    teacher: str | Path | None  # of a distil stage
    student: str | Path | None  # of a distil stage, where it is not what enters
    data: RecipeData
    seed: int
    saves: bool = True  # False on all but the first of several processes


def change_model(stage: Stage, work: Work) -> dict[str, Any]:
    """Run a stage that makes another model, and save it with its tokenizer in `work.folder / "model"`."""
    tokenizer = work.data.tokenizer(work.source)
    if stage.kind != "fine-tune" and not (stage.part("fine-tune")):
        work.data.check_labels(AutoConfig.from_pretrained(work.source), f"The model that enters {stage.name}")
    set_seed(work.seed)
    if stage.parts or stage.method.trains:
        model, figures = train(stage, work, tokenizer)
    else:
        model = load(work.source, work.data)
        rows = work.data.tokenized(tokenizer, model.config)["train"]
        samples = Samples(work.data.training_texts(), rows, work.data.collator(tokenizer), work.seed)
        model, tokenizer = stage.own.apply(model, tokenizer, samples)
        figures = {}
    if work.saves:
        save(model, tokenizer, work.folder / "model")
        if work.data.task == Embeddings.name and not (work.folder / "model" / "modules.json").is_file():
            copy_pooling(work.source, work.folder / "model")  # a training has written its own
    return figures


def export_model(stage: Stage, work: Work) -> dict[str, Any]:
    """Write the model that enters a stage into `work.folder / EXPORT`. Returns how far it agreed with the model."""
    format, folder, tokenizer = stage.own.format, work.folder / EXPORT, work.data.tokenizer(work.source)
    discard(folder)  # whole, but of a run that was cut off behind it
    model = load(work.source, work.data)
    options: dict[str, Any] = {}
    if format in GRAPHS:
        rows = work.data.tokenized(tokenizer, model.config)["train"]
        samples = Samples(work.data.training_texts(), rows, work.data.collator(tokenizer), work.seed)
        options["calibration"] = samples.loader(TEXTS, TEXTS // 2)
    export(model, folder, format=format, tokenizer=tokenizer, **options)
    record = folder / RECORD
    return json.loads(record.read_text(encoding="utf-8"))["agreement"] if record.is_file() else {}


def train(stage: Stage, work: Work, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train one stage, or the parts of one that works together. Returns the finished model and its last losses."""
    main = stage.part("fine-tune") or stage.part("distil") or stage
    arguments: TrainingArguments = main.own
    arguments = replace_output(arguments, work.folder / "trainer", work.seed, main.given)
    fresh_head = main.kind == "fine-tune"
    model = load(work.source, work.data, fresh_head=fresh_head)
    extra: dict[str, Any] = {}
    if main.kind == "distil":
        student = next(option for option in main.options if isinstance(option, StudentOptions))
        extra["teacher_model"] = load(work.teacher, work.data)
        if work.student:
            model = load(work.student, work.data, teacher=extra["teacher_model"].config)
        elif shape := student.shape():
            model = make_student(model, **shape)
    rows = work.data.tokenized(tokenizer, model.config, unlabelled=main.kind == "distil")
    if main.kind == "distil" and student.cache_teacher:
        extra["teacher_model"] = kept_outputs(extra["teacher_model"], rows, work, tokenizer)
    qat: QATOptions | None = next((part.own for part in stage.parts if part.kind == "quantize"), None)
    pruning = [part.own.callback() for part in stage.parts if part.kind == "prune"]
    if qat:
        model = qat.prepare(model)
    callbacks = pruning + ([qat.callback()] if qat else [])
    trainer = with_own_bar(main.method.trainer(
        model, arguments, train_dataset=rows["train"], eval_dataset=rows["validation"], processing_class=tokenizer,
        data_collator=work.data.collator(tokenizer), **({"callbacks": callbacks} if callbacks else {}), **extra,
    ), stage.name)  # fmt: skip
    checkpoint = last_complete_checkpoint(arguments.output_dir)
    if checkpoint:
        logger.warning("%s goes on from %s.", stage.name, Path(checkpoint).name)
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.finish()
    if work.saves and isinstance(trainer, EmbeddingDistillationTrainer):
        trainer.write_vectors(work.folder / "model")
    if qat:
        model = cast(model, qat.dtype)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {"steps": trainer.state.global_step, **({"last_losses": losses[-1]} if losses else {})}
    return model, figures | validated(model, rows["validation"], work, tokenizer)


def validated(model: PreTrainedModel, rows: Dataset, work: Work, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How a model does on the validation texts, 1,000 at most; nothing where there are no labels."""
    has_labels = work.data.task != CLASSIFICATION or "labels" in rows.column_names
    if not (work.saves and has_labels and work.data.kind.is_trained_on_labels):
        return {}
    rows = usable_rows(rows.select(range(min(len(rows), 1000))), model)
    metric = metric_for(model, rows)
    with fast_forward(model.device):
        scores = example_scores(model, rows, work.data.collator(tokenizer), metric=metric, batch_size=32)
    return {"validation": {"metric": metric.name, "value": float(metric.total(scores)), "texts": len(rows)}}


def kept_outputs(
    teacher: PreTrainedModel, rows: Mapping[str, Dataset], work: Work, tokenizer: PreTrainedTokenizerBase
) -> CachedTeacher:
    """The teacher's logits for all rows, computed once; an interrupted run goes on with what is there."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with fast_forward(device):
        for name in ("train", "validation"):
            kept = cache_teacher(
                teacher, rows[name], work.folder / "trainer" / "teacher", processing_class=tokenizer,
                data_collator=work.data.collator(tokenizer),
            )  # fmt: skip
    return kept


def replace_output(
    arguments: TrainingArguments, folder: Path, seed: int, given: Mapping[str, Any]
) -> TrainingArguments:
    """`arguments` that write to `folder`, with the recipe's seed where the stage gives none."""
    arguments = copy.copy(arguments)
    arguments.output_dir = str(folder)
    if "seed" not in given:
        arguments.seed = seed
    return arguments


def load(
    source: str | Path, data: RecipeData, *, fresh_head: bool = False, teacher: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model for the data's task. With `fresh_head`, labels that it does not know get a new head.

    A model without a head gets one for the labels of `teacher`, where one is given.
    """
    kind, config = data.kind, AutoConfig.from_pretrained(source)
    options = {}
    if fresh_head and not data.fits(config):
        options = kind.head(data.opened)
    elif teacher is not None and not kind.has_head(config):
        options = kind.of_teacher(teacher)
    if options:
        options["ignore_mismatched_sizes"] = options["num_labels"] != config.num_labels
    model = getattr(transformers, kind.auto_class).from_pretrained(source, **options)
    if kind.pads and model.config.pad_token_id is None:  # a decoder finds a text's end by it
        model.config.pad_token_id = data.tokenizer(source).pad_token_id
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
