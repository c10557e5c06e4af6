"""Stages that make another model: at once, or by a training that goes on from its trainer's last whole checkpoint."""

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hf_compress.distillation import TERMS
from hf_compress.distillation.methods.embeddings import EmbeddingDistillationTrainer
from hf_compress.distillation.students import make_student
from hf_compress.distillation.teachers.cache import cache_teacher
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.terms import Term
from hf_compress.measuring.metrics import metric_for
from hf_compress.measuring.quality import example_scores, usable_rows
from hf_compress.model.pooling import copy_pooling
from hf_compress.model.precision import cast, fast_forward
from hf_compress.recipe.data import CLASSIFICATION, RecipeData
from hf_compress.recipe.one_shot import Samples
from hf_compress.recipe.options import RecipeError, build, unknown
from hf_compress.recipe.quantizing import QATOptions
from hf_compress.recipe.stage import Made, Past, Stage, Work
from hf_compress.recipe.tasks.embedding import Embeddings
from hf_compress.training.bar import with_own_bar
from hf_compress.training.ranks import is_main
from hf_compress.training.resume import last_complete_checkpoint

logger = logging.getLogger(__name__)


class Change(Stage):
    """Makes another model, and saves it with its tokenizer in `work.folder / "model"`."""

    @property
    def reads(self) -> bool:
        """Rounding to nearest and whole layers that go do without texts."""
        return self.method.trains or bool(self.together) or getattr(self.own, "needs_texts", True)

    def run(self, work: Work) -> dict[str, Any]:
        tokenizer = work.data.tokenizer(work.source)
        if self.reads and not self.tunes:
            work.data.check_labels(AutoConfig.from_pretrained(work.source), f"The model that enters {self.name}")
        set_seed(work.seed)
        model, tokenizer, figures = self.make(work, tokenizer)
        if is_main():
            model.save_pretrained(work.folder / "model")
            tokenizer.save_pretrained(work.folder / "model")
            if work.data.task == Embeddings.name and not (work.folder / "model" / "modules.json").is_file():
                copy_pooling(work.source, work.folder / "model")  # a training has written its own
        return {"figures": figures}

    def make(self, work: Work, tokenizer: PreTrainedTokenizerBase) -> tuple:
        """The model, its tokenizer, and figures of how it came about."""
        model = work.load(work.source)
        samples = work.samples(model, tokenizer) if self.reads else Samples((), (), None, work.seed)
        return *self.own.apply(model, tokenizer, samples), {}


class Train(Change):
    """One training: of any method that has a trainer, joined by the others of `together`."""

    split, everywhere = "train", True
    caches_teacher = False

    def make(self, work: Work, tokenizer: PreTrainedTokenizerBase) -> tuple:
        model, teacher = self.models(work)
        terms = self.terms()
        if any(term.needs_graph for term in terms):  # they differentiate the model twice, which fused attention cannot
            model.set_attn_implementation("eager")
        rows = work.data.tokenized(tokenizer, model.config, unlabelled=self.unlabelled)
        if self.caches_teacher:
            teacher = kept_outputs(teacher, rows, work, tokenizer, bf16=self.own.bf16)
        others = [part.own for part in self.parts if part.method is not self.method]
        qat = [one for one in others if isinstance(one, QATOptions)]
        for one in qat:
            model = one.prepare(model)
        callbacks = [one.callback() for one in sorted(others, key=lambda one: one in qat)]  # pruning first
        extra = {"callbacks": callbacks or None, "teacher_model": teacher, "terms": terms or None}
        arguments = self.arguments(work)
        trainer = with_own_bar(self.method.trainer(
            model, arguments, train_dataset=rows["train"], eval_dataset=rows["validation"], processing_class=tokenizer,
            data_collator=work.data.collator(tokenizer),
            **{name: value for name, value in extra.items() if value is not None},
        ), self.name)  # fmt: skip
        checkpoint = last_complete_checkpoint(arguments.output_dir)
        if checkpoint:
            logger.warning("%s goes on from %s.", self.name, Path(checkpoint).name)
        trainer.train(resume_from_checkpoint=checkpoint)
        model = trainer.finish()
        if is_main() and isinstance(trainer, EmbeddingDistillationTrainer):
            trainer.write_vectors(work.folder / "model")
        for one in qat:
            model = cast(model, one.dtype)
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        figures = {"steps": trainer.state.global_step, **({"last_losses": losses[-1]} if losses else {})}
        return model, tokenizer, figures | validated(model, rows["validation"], work, tokenizer)

    def models(self, work: Work) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        """What is trained, and its teacher."""
        return work.load(work.source, fresh_head=self.tunes), None

    def terms(self) -> list[Term]:
        """Losses of inner layers besides the method's own."""
        return []

    def arguments(self, work: Work) -> TrainingArguments:
        """What was asked for, within the stage's folder, with the recipe's seed where the stage gives none."""
        arguments = copy.copy(self.own)
        arguments.output_dir = str(work.folder / "trainer")
        if not any("seed" in part.given for part in self.parts):
            arguments.seed = work.seed
        return arguments


class FineTune(Train):
    needs_labels = tunes = True

    def check(self, model: str | Path, data: RecipeData) -> None:
        if not data.kind.is_trained_on_labels:
            raise RecipeError(
                f"{self.name}: there is nothing to fine-tune on for {data.task}. Distil with `method: {data.task}`, or "
                "say another --task."
            )


@dataclass
class StudentOptions:
    """Who learns from whom; a student is made from the model that enters the stage."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "A stage's name, a folder or a Hub name; by default the model that entered, "
                          "if the student is made smaller here, else the last fine-tuned one."},
    )  # fmt: skip
    student: str | None = field(
        default=None, metadata={"help": "A stage's name, a folder or a Hub name, in place of what entered."}
    )
    cache_teacher: bool = field(
        default=False, metadata={"help": "Run the teacher once over the texts and keep its logits for all epochs."}
    )
    num_hidden_layers: str | None = field(
        default=None, metadata={"help": "Layers of the student, or their share of what enters, such as 1/3."}
    )
    layers: str = field(default="skip", metadata={"help": "Which it starts from: first, last, skip, or 0,2,5."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the student."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Neurons in each layer of the student."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads in each layer of the student."})
    weights: str = field(
        default="copy", metadata={"help": "Of a narrower matrix: copy its part of the teacher's, or fresh."}
    )
    terms: dict | str | None = field(
        default=None,
        metadata={"help": f"Losses of inner layers to learn besides, with commas: {', '.join(TERMS)}. In a recipe also "
                          "a mapping of such names to their settings."},
    )  # fmt: skip

    def __post_init__(self):
        self.make_terms()  # checks the names and settings
        sizes = {name: getattr(self, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
        depth = self.num_hidden_layers
        sizes["num_hidden_layers"] = int(depth) if depth is not None and re.fullmatch(r"-?\d+", depth) else None
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if self.layers not in ("first", "last", "skip") and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", self.layers):
            raise ValueError(f"layers must be first, last, skip or numbers such as 0,2,5, got {self.layers!r}.")
        if self.weights not in ("copy", "fresh"):
            raise ValueError(f"weights must be copy or fresh, got {self.weights!r}.")

    def shape(self) -> dict[str, Any]:
        """The arguments of `make_student`; empty when the student is not to be made smaller."""
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        shape = {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        if not shape and self.layers == "skip":
            return {}
        chosen = self.layers
        if not self.layers.isalpha():
            chosen = [int(number) for number in self.layers.split(",")]
        return {**shape, "layers": chosen, "weights": self.weights}

    @property
    def named_terms(self) -> Mapping[str, Any]:
        """name -> settings, as they were written."""
        if isinstance(self.terms, Mapping):
            return self.terms
        return {name.strip(): {} for name in (self.terms or "").split(",") if name.strip()}

    def make_terms(self) -> list[Term]:
        """Those that were named, new for each training. Raises ValueError for what is no term, or no setting of it."""
        made = []
        for name, given in self.named_terms.items():
            if name not in TERMS:
                raise unknown(str(name), TERMS, "the term")
            if not isinstance(given or {}, Mapping):
                raise ValueError(f"the settings of the term {name} must be a mapping, got {given!r}.")
            module, kind = TERMS[name]
            term = getattr(import_module(module), kind)
            made.append(term(build(term.options_class, given or {}, f"the term {name}")))
        return made


class Distil(Train):
    unlabelled = True

    @property
    def roles(self) -> StudentOptions:
        return next(options for options in self.options if isinstance(options, StudentOptions))

    @property
    def caches_teacher(self) -> bool:
        return self.roles.cache_teacher

    def named(self) -> list[str]:
        return [name for name in (self.roles.teacher, self.roles.student) if name]

    def teacher(self, past: Past) -> Made:
        if self.roles.teacher:
            return past.find(self.roles.teacher)
        return past.last if self.roles.shape() or self.roles.student else past.reference

    def needs(self, past: Past) -> dict[str, str]:
        student = {"student": past.find(self.roles.student).fingerprint} if self.roles.student else {}
        return {"teacher": self.teacher(past).fingerprint, **student}

    def models(self, work: Work) -> tuple[PreTrainedModel, PreTrainedModel | None]:
        teacher = work.load(self.teacher(work.past).source)
        if self.roles.student:
            return work.load(work.past.find(self.roles.student).source, teacher=teacher.config), teacher
        model, shape = work.load(work.source), self.roles.shape()
        return make_student(model, **shape) if shape else model, teacher

    def terms(self) -> list[Term]:
        return self.roles.make_terms()


def kept_outputs(
    teacher: PreTrainedModel, rows: Mapping[str, Dataset], work: Work, tokenizer: PreTrainedTokenizerBase, *, bf16: bool
) -> CachedTeacher:
    """The teacher's logits for all rows, computed once, in bfloat16 where the training would have them so.

    An interrupted run goes on with what is there.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with fast_forward(device, enabled=bf16):
        for name in ("train", "validation"):
            kept = cache_teacher(
                teacher, rows[name], work.folder / "trainer" / "teacher", processing_class=tokenizer,
                data_collator=work.data.collator(tokenizer),
            )  # fmt: skip
    return kept


def validated(model: PreTrainedModel, rows: Dataset, work: Work, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How a model does on the validation texts, 1,000 at most; nothing where there are no labels."""
    has_labels = len(rows) > 0 and (work.data.task != CLASSIFICATION or "labels" in rows.column_names)
    if not (is_main() and has_labels and work.data.kind.is_trained_on_labels):
        return {}
    rows = usable_rows(rows.select(range(min(len(rows), 1000))), model)
    metric = metric_for(model, rows)
    with fast_forward(model.device):
        scores = example_scores(model, rows, work.data.collator(tokenizer), metric=metric, batch_size=32)
    return {"validation": {"metric": metric.name, "value": float(metric.total(scores)), "texts": len(rows)}}
