"""The base of all distillation trainers: a `Trainer` with a teacher.

Hinton et al., 2015, https://arxiv.org/abs/1503.02531; hints: Romero et al., 2015, https://arxiv.org/abs/1412.6550

    loss = (1 - alpha) * task loss + alpha * soft loss + hint_weight * sum of hint losses
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.items import ItemsMixin
from hf_compress.distillation.losses.sums import Loss, noisy_teacher
from hf_compress.distillation.methods.hints import Hints
from hf_compress.distillation.phases import Phase, Phased, used
from hf_compress.distillation.predictions import PredictionLosses
from hf_compress.distillation.prompts import changes_positions, without_prompt
from hf_compress.distillation.runs import NO_LOGITS, Run, accepted, flat_choices, named, predictions
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.running import RunsTeacher
from hf_compress.distillation.teachers.several_teachers import teachers_of
from hf_compress.distillation.teachers.sharded_student import gather_highest
from hf_compress.distillation.teachers.teacher import (
    agree_on_problem,
    check_data,
    check_heads,
    check_match,
    frozen,
    open_teacher,
    teacher_facts,
)
from hf_compress.distillation.terms import Term, bind_all, joint_signals
from hf_compress.model.capture import capture, require_gradients
from hf_compress.model.tasks import plain_model, problem_of
from hf_compress.training.arguments import by_name, checked
from hf_compress.training.state import TrainingState, TrainingStateMixin


class DistillationTrainer(RunsTeacher, PredictionLosses, Phased, ItemsMixin, TrainingStateMixin):
    """A `Trainer` whose model learns from a teacher as well as from labels.

    Args:
        teacher_model (`PreTrainedModel`, `str` or `Path`): the teacher, or its name or folder; or a cache of its
            outputs (`CachedTeacher`, or its folder); or a list of these, whose predictions are averaged. It is never
            changed but for being frozen, and never saved.
        terms: losses of inner layers to learn besides, all the time, such as `hfc.PatientStates()`.
        phases: what is learned in which share of the steps, in place of everything at once; `DistillationTrainer` alone
            takes them, for other trainers are made of their own.

    All other arguments are those of `Trainer`. Each loss is logged under its own name, in training and evaluation.
    Raises ValueError, before any step, for a teacher and a student that cannot be matched.
    """

    config_class = DistillationConfig
    loss_is_scaled_for_ga = True  # losses are sums, divided once by the count over all micro-batches and ranks
    takes_terms = True  # False where there is no teacher whose layers could be compared

    def __init__(
        self,
        model=None,
        args=None,
        *positional,
        teacher_model=None,
        terms: Sequence[Term] = (),
        phases: Sequence[Phase] | None = None,
        **kwargs,
    ):
        who = type(self).__name__
        if terms and not self.takes_terms:
            raise ValueError(f"{who} has no teacher whose layers could be compared: give terms to DistillationTrainer.")
        self._given = terms, phases
        args, kwargs = checked(args, self.config_class, who), by_name(positional, kwargs, who)
        if teacher_model is None:
            raise ValueError(f"{type(self).__name__} needs a teacher: pass teacher_model= a model, a name or a folder.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{type(self).__name__} computes its own loss: leave compute_loss_func out.")
        super().__init__(model, args, **kwargs)
        student = plain_model(self.model)
        self.check_student(student)
        options = {"bits": args.teacher_bits, "weights": args.teacher_weights}
        teacher_model = open_teacher(teacher_model, student, **options, processing_class=self.processing_class)
        check_match(student, teacher_model, self.processing_class)
        agree_on_problem(student, teacher_model)
        self.phases = self._read_phases()
        check_heads(student, teacher_model, needs_logits=self.needs_logits)
        if self.label_smoother is not None and (self.task.kind == "spans" or problem_of(student) != "one_label"):
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} needs one label among several classes, which "
                f"{type(student).__name__} does not predict here. Set it to 0."
            )
        check_data(self.train_dataset, student)
        self._teacher_facts = teacher_facts(teacher_model, learns=not self.takes_terms) if args.world_size > 1 else {}
        self.teacher = self.prepare_teacher(teacher_model)
        self.check_layers()
        self._check_signals()
        if any(type(term).after_step is not Term.after_step for term in self.all_terms):
            self.add_callback(_AfterEachStep(self))
        if args.torch_compile and (any(self.student_signals().values()) or joint_signals(self.all_terms, "student")):
            raise ValueError(
                f"{type(self).__name__} reads inner layers of the student, which torch_compile hides. Set "
                "torch_compile=False, or use DistillationTrainer without hints."
            )
        _ = self.training_state  # built now, so that what is wrong with it is said before training

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if hasattr(self, "teacher"):  # a later model; the first one comes before its teacher
            agree_on_problem(plain_model(model), self.teacher)
        return model

    def _hp_search_setup(self, trial) -> None:
        """In a hyper-parameter search each trial has its own settings, the layers that are named in them included."""
        super()._hp_search_setup(trial)
        if trial is not None:
            self.check_layers()
            self._check_signals()

    def facts(self) -> dict[str, str]:
        return {**super().facts(), **self._teacher_facts}

    # What the methods override

    def check_student(self, student: nn.Module) -> None:
        """Raise ValueError for a student or data that the method cannot train, before a teacher is loaded."""

    def prepare_teacher(self, teacher: nn.Module) -> nn.Module:
        return frozen(teacher, self.args.device, is_sharded=self.accelerator.is_fsdp2)

    def own_terms(self) -> list[Term]:
        """The terms of this trainer, made from its config."""
        return [Hints(self.args)] if self.args.hints else []

    def make_phases(self) -> list[Phase]:
        return [Phase(1.0, self.own_terms())]

    def _read_phases(self) -> list[Phase]:
        """Those that were given, or this trainer's own; the terms that were given belong to each."""
        terms, phases = self._given
        if phases is not None and (self.own_terms() or type(self).make_phases is not DistillationTrainer.make_phases):
            raise ValueError(
                f"{type(self).__name__} with these settings has terms of its own, and phases= say what is learned: "
                "use DistillationTrainer, with all terms, such as hfc.Hints(hints=...), in the phases."
            )
        phases = used(self.make_phases() if phases is None else phases)
        return [replace(phase, terms=[*phase.terms, *terms]) for phase in phases]

    def check_layers(self) -> None:
        """Raise ValueError when the layers or widths that the losses need are not there."""
        self.phases = self._read_phases()
        for phase in self.phases:
            bind_all(phase.terms, plain_model(self.model), self.teacher)
        self.check_frozen()

    def student_signals(self) -> dict[str, Iterable[int]]:
        """Which `attention` and `hidden_states` of the student to capture for this step."""
        return joint_signals(self.phase.terms, "student")

    def teacher_signals(self) -> dict[str, Iterable[int]]:
        return joint_signals(self.phase.terms, "teacher")

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = TrainingState()
        for term in self.all_terms:
            for name, value in term.make_state(plain_model(model), self.teacher).items():
                state.add(name, value)
        return state

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        own = self.prediction_losses(student, teacher, inputs) if self.phase.predictions else {}
        return self.with_terms(own, student, teacher, inputs)

    # Terms; the losses of predictions are in `PredictionLosses`

    @property
    def all_terms(self) -> list[Term]:
        """Those of all phases, each once."""
        return list(dict.fromkeys(term for phase in self.phases for term in phase.terms))

    def with_terms(self, losses: dict[str, Loss], student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        """`losses` and those of the terms of this step."""
        losses = dict(losses)
        for term in self.phase.terms:
            with torch.set_grad_enabled(torch.is_grad_enabled() and (student.learns or term.needs_graph)):
                found = term.losses(student, teacher, inputs, self.training_state)
            for name, loss in found.items():
                losses[f"{term.name}_{name}" if name in losses else name] = loss
        return losses

    @property
    def needs_labels(self) -> bool:
        """Whether a loss of this step, or of an evaluation after it, reads labels."""
        return self.phase.predictions and self.args.alpha < 1

    @property
    def needs_logits(self) -> bool:
        """Whether a loss of this training compares logits; the losses of a method may need none."""
        return self.args.alpha > 0 and any(phase.predictions for phase in self.phases)

    @property
    def reads_logits(self) -> bool:
        """Whether the losses of this step do."""
        return self.phase.predictions and self.needs_logits

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """As in `Trainer`, but losses that read no labels are told of batches without them as well."""
        if self.needs_labels or self._label_columns & inputs.keys():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        logits = tuple(value for name, value in outputs.items() if name not in (*ignore_keys, "loss"))
        return loss.detach(), None if prediction_loss_only else logits[0] if len(logits) == 1 else logits, None

    # Running both models

    @property
    def _label_columns(self) -> set[str]:
        return {*self.label_names, "labels", "label", "label_ids"}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        inputs = self._with_decoder_inputs(student, inputs)
        teacher = self.run_teacher(inputs)
        student_inputs = self.student_inputs(student, inputs)

        def add_losses(module, args, outputs):
            """Replace the outputs by the whole loss and detached logits.

            Inside the forward, so that DDP sees just the parameters that the loss depends on.
            """
            outputs = named(outputs, student, has_labels=bool(self._label_columns & student_inputs.keys()))
            outputs = without_prompt(student, self.task, outputs, signals)
            reads_logits = by_predictions or self.reads_logits
            logits = self.task.logits(outputs, inputs) if reads_logits else NO_LOGITS
            run = Run(outputs, logits, signals.hidden_states, signals.attention, learns)
            if reads_logits:
                teacher.logits = self.teacher_logits(teacher.outputs, run.logits, inputs)
            if model.training and self.args.teacher_noise:
                noise = (self.args.teacher_noise, self.args.teacher_noise_share, self.args.teacher_noise_form)
                teacher.logits = noisy_teacher(teacher.logits, *noise)
            if model.training:
                inner = [*run.hidden_states.values(), *(a.query for a in run.attention.values())]
                require_gradients(student, inner)
            losses = self.prediction_losses if by_predictions else self.distillation_losses
            losses = losses(run, teacher, flat_choices(inputs))
            loss = self.total(losses, self.task.count(inputs), training=model.training)
            gather_highest(student, inside)
            return predictions(outputs, loss, student, all_outputs=not model.training)

        wanted = self.student_signals()
        by_predictions = self.is_finished and any(wanted.values())  # layers and heads of old are gone
        wanted = {} if by_predictions else wanted
        inside = wanted.get("attention", ()) if self.accelerator.is_fsdp2 and model.training else ()
        learns = torch.is_grad_enabled()
        needs_graph = learns or any(term.needs_graph for term in self.phase.terms)
        with torch.set_grad_enabled(needs_graph), capture(student, **wanted) as signals:
            if self.args.torch_compile:
                outputs = add_losses(student, (), model(**student_inputs))
            else:
                handle = student.register_forward_hook(add_losses)
                try:
                    outputs = model(**student_inputs)
                finally:
                    handle.remove()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def student_inputs(self, student: nn.Module, inputs: dict) -> dict:
        """What the student's forward gets of a batch. Labels of tokens that a prompt moves are read here alone."""
        found = accepted(student, inputs)
        is_moved = self.task.kind != "sequence" and changes_positions(student)
        return {k: v for k, v in found.items() if k not in (self._label_columns if is_moved else ())}

    def _with_decoder_inputs(self, student: nn.Module, inputs: dict) -> dict:
        """Give both models of a sequence-to-sequence task the same decoder inputs, made from the labels as usual."""
        plain = plain_model(student)
        makes_them = hasattr(plain, "prepare_decoder_input_ids_from_labels") and plain.config.is_encoder_decoder
        if not makes_them or "decoder_input_ids" in inputs or "labels" not in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": plain.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher reads, too."""
        super()._set_signature_columns_if_needed()
        for teacher in teachers_of(self.teacher):
            is_cached = isinstance(teacher, CachedTeacher)
            theirs = teacher.columns if is_cached else inspect.signature(plain_model(teacher).forward).parameters
            self._signature_columns += [name for name in theirs if name not in self._signature_columns]


class _AfterEachStep(TrainerCallback):
    """Tells terms that an optimiser step has ended."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_step_end(self, *args, **kwargs) -> None:
        for term in self.trainer.phase.terms:
            term.after_step(self.trainer.training_state, self.trainer.accelerator)
