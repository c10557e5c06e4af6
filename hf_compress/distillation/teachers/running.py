"""What a trainer does with its teacher, whether it is a live model, a cache, or several of them."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.modeling_outputs import ModelOutput

from hf_compress.distillation.prompts import without_prompt
from hf_compress.distillation.runs import NO_LOGITS, Run, accepted, named
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher, complete
from hf_compress.distillation.teachers.several_teachers import SeveralTeachers, mean_logits, teachers_of
from hf_compress.distillation.terms import joint_signals
from hf_compress.model.capture import capture
from hf_compress.model.tasks import LANGUAGE_MODELS, auto_class_name, plain_model


class RunsTeacher(Trainer):
    """For trainers with `self.teacher`, `self.task` and `self.all_terms`."""

    def run_teacher(self, inputs: dict) -> Run:
        """Outputs and signals of the teacher; of several teachers a list of outputs."""
        if isinstance(self.teacher, SeveralTeachers):
            return Run([self._run_one(one, inputs, {}).outputs for one in self.teacher.all], NO_LOGITS, {}, {})
        return self._run_one(self.teacher, inputs, {} if self.is_finished else self.teacher_signals())

    def _run_one(self, teacher: nn.Module, inputs: dict, signals: dict[str, Iterable[int]]) -> Run:
        if isinstance(teacher, CachedTeacher):
            outputs, hidden_states = teacher.look_up(inputs, signals.get("hidden_states", ()))
            return Run(outputs, NO_LOGITS, hidden_states, {})
        inputs = accepted(teacher, {k: v for k, v in inputs.items() if k not in self._label_columns})
        if getattr(getattr(plain_model(teacher), "config", None), "use_cache", False):
            inputs["use_cache"] = False
        with torch.no_grad(), self.accelerator.autocast(), capture(teacher, **signals) as captured:
            outputs = named(teacher(**inputs), teacher)
        outputs = without_prompt(teacher, self.task, outputs, captured)
        return Run(outputs, NO_LOGITS, captured.hidden_states, captured.attention)

    def teacher_logits(self, outputs: ModelOutput | list[ModelOutput], student_logits: Tensor, inputs: dict) -> Tensor:
        """The teacher's logits that count, (items, C), like the student's; of several teachers their mean."""
        if isinstance(outputs, list):
            pairs = zip(self.teacher.all, outputs, strict=True)
            logits = [self._logits_of(one, theirs, student_logits, inputs) for one, theirs in pairs]
            kind = self.kind_of(student_logits)
            return mean_logits(logits, self.teacher.weights, temperature=self.args.temperature, kind=kind)
        return self._logits_of(self.teacher, outputs, student_logits, inputs)

    def _logits_of(self, teacher: nn.Module, outputs: ModelOutput, student_logits: Tensor, inputs: dict) -> Tensor:
        if "drawn_classes" in outputs:
            return NO_LOGITS  # but draws, see `PredictionLosses.teacher_loss`
        if "top_logits" not in outputs:
            return self.task.logits(outputs, inputs)
        parts = [self.task.logits({"logits": outputs[n]}, inputs) for n in ("top_logits", "top_indices", "rest")]
        return complete(*parts, student_logits.detach(), classes=teacher.manifest["classes"])

    def _check_draws(self, cache: CachedTeacher) -> None:
        """Raise ValueError where a loss needs more of the teacher's distribution than draws from it."""
        args, who = self.args, f"The cache in {cache.path} holds {cache.manifest['draws']} draws of each prediction"
        if isinstance(self.teacher, SeveralTeachers):
            raise ValueError(f"{who}, which have no mean with other teachers' logits. Cache all logits, or top_k.")
        if args.temperature != 1 or args.prediction_loss == "logits" or args.teacher_noise:
            raise ValueError(
                f"{who}, at temperature 1 and without logits: expected temperature=1, prediction_loss='auto' and "
                f"teacher_noise=0, got {args.temperature}, {args.prediction_loss!r} and {args.teacher_noise}. Change "
                "these, or use a cache of all logits or top_k, or the teacher itself."
            )
        config = getattr(plain_model(self.model), "config", None)
        mine = config.get_text_config().vocab_size if auto_class_name(self.model) in LANGUAGE_MODELS else None
        if mine is not None and mine < cache.manifest["classes"]:
            raise ValueError(
                f"{who} among {cache.manifest['classes']} classes, of which the student has the first {mine}. Resize "
                "the student's embeddings."
            )

    def _check_signals(self) -> None:
        """Raise ValueError when caches lack signals that the losses need, or examples of the data."""
        signals, who = joint_signals(self.all_terms, "teacher"), type(self).__name__
        if isinstance(self.teacher, SeveralTeachers) and any(map(list, signals.values())):
            raise ValueError(
                f"{who} learns from inner layers, and layers of {len(self.teacher.all)} teachers have no mean. Give it "
                "one teacher, or learn from predictions alone: DistillationTrainer without hints."
            )
        caches = [one for one in teachers_of(self.teacher) if isinstance(one, CachedTeacher)]
        for cache in caches:
            cache.check_signals(signals, who)
            cache.check_tokenizer(self.processing_class)
            if cache.manifest["draws"]:
                self._check_draws(cache)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation set": self.eval_dataset}
        prepare = partial(self._with_decoder_inputs, plain_model(self.model))
        for what, data in {"training set": self.train_dataset, **evaluated}.items() if caches else ():
            if hasattr(data, "__len__") and not isinstance(data, IterableDataset):  # a stream is read once
                has_columns = getattr(data, "column_names", None) is not None
                collate = self.data_collator
                if not has_columns:
                    collate = self._get_collator_with_removed_columns(collate)
                rows = self._remove_unused_columns(data) if has_columns else data
                batches = DataLoader(rows, batch_size=64, collate_fn=collate, generator=torch.Generator())
                for cache in caches:
                    cache.check_examples(batches, prepare, what=what, quiet=self.args.disable_tqdm)
