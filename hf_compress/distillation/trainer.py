"""The base of all distillation trainers: a `Trainer` with a teacher.

Hinton et al., 2015, https://arxiv.org/abs/1503.02531; hints: Romero et al., 2015, https://arxiv.org/abs/1412.6550

    loss = (1 - alpha) * task loss + alpha * soft loss + hint_weight * sum of hint losses
"""

import inspect
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.layer_map import parse_pairs
from hf_compress.distillation.losses.sums import Loss, Unit, hidden_state_loss, noisy_teacher
from hf_compress.distillation.predictions import PredictionLosses
from hf_compress.distillation.prompts import changes_positions, without_prompt
from hf_compress.distillation.runs import NO_LOGITS, Run, accepted, flat_choices, named, predictions, projection
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher, complete
from hf_compress.distillation.teachers.several_teachers import SeveralTeachers, mean_logits, teachers_of
from hf_compress.distillation.teachers.sharded_student import gather_highest
from hf_compress.distillation.teachers.teacher import (
    agree_on_problem,
    check_data,
    check_heads,
    check_match,
    frozen,
    open_teacher,
)
from hf_compress.distillation.terms import LoggedTermsMixin
from hf_compress.model.anatomy import anatomy
from hf_compress.model.capture import capture, require_gradients
from hf_compress.model.tasks import plain_model, problem_of
from hf_compress.training.arguments import by_name, checked
from hf_compress.training.state import TrainingState, TrainingStateMixin


class DistillationTrainer(PredictionLosses, LoggedTermsMixin, TrainingStateMixin):
    """A `Trainer` whose model learns from a teacher as well as from labels.

    Args:
        teacher_model (`PreTrainedModel`, `str` or `Path`): the teacher, or its name or folder; or a cache of its
            outputs (`CachedTeacher`, or its folder); or a list of these, whose predictions are averaged. It is never
            changed but for being frozen, and never saved.

    All other arguments are those of `Trainer`. Each loss is logged under its own name, in training and evaluation.
    Raises ValueError, before any step, for a teacher and a student that cannot be matched.
    """

    config_class = DistillationConfig
    loss_is_scaled_for_ga = True  # losses are sums, divided once by the count over all micro-batches and ranks

    def __init__(self, model=None, args=None, *positional, teacher_model=None, **kwargs):
        who = type(self).__name__
        args, kwargs = checked(args, self.config_class, who), by_name(positional, kwargs, who)
        if teacher_model is None:
            raise ValueError(f"{type(self).__name__} needs a teacher: pass teacher_model= a model, a name or a folder.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{type(self).__name__} computes its own loss: leave compute_loss_func out.")
        super().__init__(model, args, **kwargs)
        student = plain_model(self.model)
        options = {"bits": args.teacher_bits, "weights": args.teacher_weights}
        teacher_model = open_teacher(teacher_model, student, **options)
        check_match(student, teacher_model, self.processing_class)
        agree_on_problem(student, teacher_model)
        check_heads(student, teacher_model, needs_logits=self.needs_logits)
        if self.label_smoother is not None and (self.task.kind == "spans" or problem_of(student) != "one_label"):
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} needs one label among several classes, which "
                f"{type(student).__name__} does not predict here. Set it to 0."
            )
        check_data(self.train_dataset, student)
        self.teacher = self.prepare_teacher(teacher_model)
        self.check_layers()
        self._check_signals()
        if args.torch_compile and any(self.student_signals().values()):
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

    # What the methods override

    def prepare_teacher(self, teacher: nn.Module) -> nn.Module:
        return frozen(teacher, self.args.device, is_sharded=self.accelerator.is_fsdp2)

    def check_layers(self) -> None:
        """Raise ValueError when the layers or widths that the losses need are not there."""
        self.hints = parse_pairs(self.args.hints, self.model, self.teacher) if self.args.hints else []

    def student_signals(self) -> dict[str, Iterable[int]]:
        """Which `attention` and `hidden_states` of the student to capture for this step."""
        return {"hidden_states": [mine for mine, _ in self.hints]}

    def teacher_signals(self) -> dict[str, Iterable[int]]:
        return {"hidden_states": [theirs for _, theirs in self.hints]}

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = TrainingState()
        for mine, theirs in self.hints:
            state.add(f"hint_{mine}_{theirs}", projection(model, self.teacher))
        return state

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        return {**self.prediction_losses(student, teacher, inputs), **self.hint_losses(student, teacher, inputs)}

    # Losses of inner layers; those of predictions are in `PredictionLosses`

    def hint_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        if not self.hints:
            return {}
        sums: dict[Unit, list[Tensor]] = {}
        for mine, theirs in self.hints:
            project = getattr(self.training_state, f"hint_{mine}_{theirs}")
            states, targets = student.hidden_states[mine], teacher.hidden_states[theirs]
            weights, unit = self.real_tokens(states, inputs, is_decoder=self.is_decoder_state(mine))
            sums.setdefault(unit, []).append(hidden_state_loss(project(states.float()), targets, weights))
        return {
            "decoder_hint_loss" if unit == "prediction" else "hint_loss": Loss(
                torch.stack(values).sum(), unit, self.args.hint_weight
            )
            for unit, values in sums.items()
        }

    def real_tokens(self, states: Tensor, inputs: dict, *, is_decoder: bool = False) -> tuple[Tensor, Unit]:
        """The weight of each token of `states` (B, T, D), 0 for padding, as (B, T); and what they are counted in."""
        if is_decoder:
            counted = self.task.counted(inputs)
            if counted is not None:
                return counted, "prediction"
            # one prediction an example: the decoder reads the text once more
        if "input_ids" not in inputs:  # pixels: an example is the mean of its patches
            return torch.full(states.shape[:2], 1 / states.shape[1], device=states.device), "example"
        mask = inputs.get("attention_mask")
        return torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask.bool(), "token"

    def is_decoder_state(self, number: int) -> bool:
        """Whether the student's hidden state `number` belongs to the decoder of an encoder-decoder."""
        stacks = anatomy(plain_model(self.model)).stacks
        return len(stacks) > 1 and number > len(stacks[0].layers)

    @property
    def needs_labels(self) -> bool:
        """Whether a loss of this step, or of an evaluation after it, reads labels."""
        return self.args.alpha < 1

    @property
    def needs_logits(self) -> bool:
        """Whether a loss of this training compares logits; the losses of a method may need none."""
        return self.args.alpha > 0

    @property
    def reads_logits(self) -> bool:
        """Whether the losses of this step do."""
        return self.needs_logits

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """As in `Trainer`, but losses that read no labels are told of batches without them as well."""
        if self.needs_labels or self._label_columns & inputs.keys():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        logits = tuple(value for name, value in outputs.items() if name not in (*ignore_keys, "loss"))
        return loss, None if prediction_loss_only else logits[0] if len(logits) == 1 else logits, None

    # Running both models

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
            kind = self.prediction_kind
            return mean_logits(logits, self.teacher.weights, temperature=self.args.temperature, kind=kind)
        return self._logits_of(self.teacher, outputs, student_logits, inputs)

    def _logits_of(self, teacher: nn.Module, outputs: ModelOutput, student_logits: Tensor, inputs: dict) -> Tensor:
        if "top_logits" not in outputs:
            return self.task.logits(outputs, inputs)
        parts = [self.task.logits({"logits": outputs[n]}, inputs) for n in ("top_logits", "top_indices", "rest")]
        return complete(*parts, student_logits.detach(), classes=teacher.manifest["classes"])

    def _check_signals(self) -> None:
        """Raise ValueError when caches lack signals that the losses need, or examples of the data."""
        signals, who = self.teacher_signals(), type(self).__name__
        if isinstance(self.teacher, SeveralTeachers) and any(map(list, signals.values())):
            raise ValueError(
                f"{who} learns from inner layers, and layers of {len(self.teacher.all)} teachers have no mean. Give it "
                "one teacher, or learn from predictions alone: DistillationTrainer without hints."
            )
        caches = [one for one in teachers_of(self.teacher) if isinstance(one, CachedTeacher)]
        for cache in caches:
            cache.check_signals(signals, who)
            cache.check_tokenizer(self.processing_class)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation set": self.eval_dataset}
        prepare = partial(self._with_decoder_inputs, plain_model(self.model))
        for what, data in {"training set": self.train_dataset, **evaluated}.items() if caches else ():
            if hasattr(data, "__len__"):
                has_columns = getattr(data, "column_names", None) is not None
                collate = self.data_collator
                if not has_columns:
                    collate = self._get_collator_with_removed_columns(collate)
                rows = self._remove_unused_columns(data) if has_columns else data
                batches = DataLoader(rows, batch_size=64, collate_fn=collate, generator=torch.Generator())
                for cache in caches:
                    cache.check_examples(batches, prepare, what=what, quiet=self.args.disable_tqdm)

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
            outputs = without_prompt(student, self.task, named(outputs, student), signals)
            reads_logits = by_predictions or self.reads_logits
            logits = self.task.logits(outputs, inputs) if reads_logits else NO_LOGITS
            run = Run(outputs, logits, signals.hidden_states, signals.attention)
            if reads_logits:
                teacher.logits = self.teacher_logits(teacher.outputs, run.logits, inputs)
            if model.training and self.args.teacher_noise:
                noise = (self.args.teacher_noise, self.args.teacher_noise_share, self.args.teacher_noise_form)
                teacher.logits = noisy_teacher(teacher.logits, *noise)
            if model.training:
                require_gradients([*run.hidden_states.values(), *(a.query for a in run.attention.values())])
            losses = self.prediction_losses if by_predictions else self.distillation_losses
            losses = losses(run, teacher, flat_choices(inputs))
            loss = self.total(losses, self.task.count(inputs), training=model.training)
            gather_highest(student, inside)
            return predictions(outputs, loss, student, all_outputs=not model.training)

        wanted = self.student_signals()
        by_predictions = self.is_finished and any(wanted.values())  # layers and heads of old are gone
        wanted = {} if by_predictions else wanted
        inside = wanted.get("attention", ()) if self.accelerator.is_fsdp2 and model.training else ()
        with capture(student, **wanted) as signals:
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
