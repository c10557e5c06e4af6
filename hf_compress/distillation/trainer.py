"""The base of all distillation trainers: a `Trainer` with a teacher.

Hinton et al., 2015, https://arxiv.org/abs/1503.02531; hints: Romero et al., 2015, https://arxiv.org/abs/1412.6550

    loss = (1 - alpha) * task loss + alpha * soft loss + hint_weight * sum of hint losses
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_compress.distillation.layer_map import parse_pairs
from hf_compress.distillation.losses.sums import (
    Loss,
    Unit,
    binary_soft_loss,
    hidden_state_loss,
    logit_loss,
    noisy_teacher,
    soft_loss,
)
from hf_compress.distillation.tasks import Task, plain_model, problem_of
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher, complete
from hf_compress.distillation.teachers.several_teachers import Kind, SeveralTeachers, mean_logits, teachers_of
from hf_compress.distillation.teachers.sharded_student import gather_highest
from hf_compress.distillation.teachers.teacher import check_data, check_match, frozen, open_teacher
from hf_compress.distillation.terms import LoggedTermsMixin
from hf_compress.model.anatomy import anatomy
from hf_compress.model.capture import AttentionSignals, capture, require_gradients
from hf_compress.training.arguments import CompressionArguments
from hf_compress.training.state import TrainingState, TrainingStateMixin

PREDICTION_LOSSES = ("auto", "soft", "logits")


@dataclass
class DistillationConfig(CompressionArguments):
    alpha: float = field(default=0.5, metadata={"help": "Share of the soft loss, 0 to 1; the task loss gets the rest."})
    temperature: float = field(default=2.0, metadata={"help": "Divides the logits before softmax; above 0."})
    prediction_loss: str = field(
        default="auto",
        metadata={
            "help": "Distance to the teacher's logits: `soft` (KL of softened probabilities), `logits` (squared "
            "distance), `auto` (soft, but logits for regression)."
        },
    )
    teacher_noise: float = field(default=0.0, metadata={"help": "Sigma of noise on the teacher's logits; 0 for none."})
    teacher_noise_share: float = field(default=0.5, metadata={"help": "Share of examples that get noise, 0 to 1."})
    teacher_noise_form: str = field(
        default="relative", metadata={"help": "`relative` for (1 + noise) * logits, `additive` for logits + noise."}
    )
    hints: str | None = field(
        default=None,
        metadata={
            "help": "Hidden states to learn from, as pairs student:teacher, such as `1:2,3:6`; 0 is the embedding."
        },
    )
    hint_weight: float = field(default=1.0, metadata={"help": "Weight of the hint losses."})
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of several teachers in their mean, one each; equal when not given."}
    )
    teacher_bits: int | None = field(
        default=None, metadata={"help": "Load a teacher given by name in 8 or 4 bits through bitsandbytes."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the share of the soft loss and must lie between 0 and 1, got {self.alpha}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}. Usual values are 1 to 20.")
        if self.prediction_loss not in PREDICTION_LOSSES:
            raise ValueError(f"prediction_loss must be one of {PREDICTION_LOSSES}, got {self.prediction_loss!r}.")
        if self.teacher_noise < 0 or not 0 <= self.teacher_noise_share <= 1:
            raise ValueError(
                "teacher_noise must be 0 or more and teacher_noise_share between 0 and 1, got "
                f"{self.teacher_noise} and {self.teacher_noise_share}."
            )
        if self.teacher_noise_form not in ("relative", "additive"):
            raise ValueError(f"teacher_noise_form must be `relative` or `additive`, got {self.teacher_noise_form!r}.")
        if self.teacher_bits not in (None, 8, 4):
            raise ValueError(f"teacher_bits must be 8, 4 or None, got {self.teacher_bits}.")


@dataclass
class Run:
    """What one model made of a batch: its outputs and the signals of its inner layers, ready for the losses."""

    outputs: ModelOutput
    logits: Tensor  # (items, C): those that count, see `Task.logits`
    hidden_states: dict[int, Tensor]
    attention: dict[int, AttentionSignals]


class DistillationTrainer(LoggedTermsMixin, TrainingStateMixin):
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

    def __init__(self, model=None, args=None, teacher_model=None, **kwargs):
        args = self.config_class("trainer_output") if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs args of type {self.config_class.__name__}, got {type(args).__name__}. "
                "Its arguments are those of TrainingArguments and a few more."
            )
        if teacher_model is None:
            raise ValueError(f"{type(self).__name__} needs a teacher: pass teacher_model= a model, a name or a folder.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{type(self).__name__} computes its own loss: leave compute_loss_func out.")
        super().__init__(model, args, **kwargs)
        student = plain_model(self.model)
        options = {"bits": args.teacher_bits, "weights": args.teacher_weights}
        teacher_model = open_teacher(teacher_model, student, **options)
        check_match(student, teacher_model, self.processing_class)
        self.task = Task.of(self.model)
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

    # Losses

    def prediction_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        """The task loss and the distance to the teacher's predictions, shared by `alpha`."""
        alpha, losses = self.args.alpha, {}
        if alpha < 1:
            losses["task_loss"] = Loss(self.task_loss(student, inputs), "label", 1 - alpha)
        if alpha > 0:
            losses["soft_loss"] = Loss(self.soft_loss(student.logits, teacher.logits), "label", alpha)
        return losses

    def task_loss(self, student: Run, inputs: dict) -> Tensor:
        """The student's own loss on the labels, as a sum over what it was averaged over."""
        if self.label_smoother is not None and "labels" in inputs:
            loss = self.label_smoother(student.outputs, inputs["labels"], shift_labels=self.task.is_shifted)
        else:
            loss = student.outputs.get("loss")
        if loss is None:
            raise ValueError(
                f"alpha={self.args.alpha} mixes in the task loss, but the batch has no labels: its columns are "
                f"{sorted(inputs)}. Add labels, or set alpha=1 to learn from the teacher alone."
            )
        count = self.task.count(inputs)["label"]
        return torch.where(count > 0, loss * count, student.logits.sum() * 0)  # the mean over no labels is NaN

    @property
    def prediction_kind(self) -> Kind:
        """What is compared: probabilities by softmax or by sigmoid, or the logits."""
        kind, problem = self.args.prediction_loss, problem_of(self.model)
        if kind == "logits" or (kind == "auto" and problem == "regression"):
            return "logits"
        return "binary" if problem == "several_labels" else "soft"

    def soft_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        classes = min(student_logits.shape[-1], teacher_logits.shape[-1])  # beyond it is padding of a vocabulary
        mine, theirs = student_logits[..., :classes], teacher_logits[..., :classes]
        kind = self.prediction_kind
        if kind == "logits":
            loss = logit_loss(mine, theirs)
        else:
            loss = (soft_loss if kind == "soft" else binary_soft_loss)(mine, theirs, self.args.temperature)
        return loss / 2 if self.task.kind == "spans" else loss  # a start and an end for each example

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
            "decoder_hint_loss" if unit == "label" else "hint_loss": Loss(
                torch.stack(values).sum(), unit, self.args.hint_weight
            )
            for unit, values in sums.items()
        }

    def real_tokens(self, states: Tensor, inputs: dict, *, is_decoder: bool = False) -> tuple[Tensor, Unit]:
        """The weight of each token of `states` (B, T, D), 0 for padding, as (B, T); and what they are counted in."""
        if is_decoder:
            return self.task.counted(inputs), "label"
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

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """As in `Trainer`, but losses that read no labels are told of batches without them as well."""
        if self.needs_labels or self._label_columns & inputs.keys():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        logits = tuple(value for name, value in outputs.items() if name != "loss")
        return loss, None if prediction_loss_only else logits[0] if len(logits) == 1 else logits, None

    # Running both models

    def run_teacher(self, inputs: dict) -> Run:
        """Outputs and signals of the teacher; of several teachers a list of outputs."""
        if isinstance(self.teacher, SeveralTeachers):
            return Run([self._run_one(one, inputs, {}).outputs for one in self.teacher.all], torch.empty(0), {}, {})
        return self._run_one(self.teacher, inputs, {} if self.is_finished else self.teacher_signals())

    def _run_one(self, teacher: nn.Module, inputs: dict, signals: dict[str, Iterable[int]]) -> Run:
        if isinstance(teacher, CachedTeacher):
            outputs, hidden_states = teacher.look_up(inputs, signals.get("hidden_states", ()))
            return Run(outputs, torch.empty(0), hidden_states, {})
        inputs = accepted(teacher, {k: v for k, v in inputs.items() if k not in self._label_columns})
        if getattr(getattr(plain_model(teacher), "config", None), "use_cache", False):
            inputs["use_cache"] = False
        with torch.no_grad(), self.accelerator.autocast(), capture(teacher, **signals) as captured:
            outputs = teacher(**inputs)
        return Run(outputs, torch.empty(0), captured.hidden_states, captured.attention)

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
            run = Run(outputs, self.task.logits(outputs, inputs), signals.hidden_states, signals.attention)
            teacher.logits = self.teacher_logits(teacher.outputs, run.logits, inputs)
            if model.training and self.args.teacher_noise:
                noise = (self.args.teacher_noise, self.args.teacher_noise_share, self.args.teacher_noise_form)
                teacher.logits = noisy_teacher(teacher.logits, *noise)
            if model.training:
                require_gradients([*run.hidden_states.values(), *(a.query for a in run.attention.values())])
            losses = (self.prediction_losses if by_predictions else self.distillation_losses)(run, teacher, inputs)
            loss = self.total(losses, self.task.count(inputs), training=model.training)
            gather_highest(student, inside)
            return ModelOutput(loss=loss, **{k: v.detach() for k, v in outputs.items() if k.endswith("logits")})

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
        """What the student's forward gets of a batch."""
        return accepted(student, inputs)

    def _with_decoder_inputs(self, student: nn.Module, inputs: dict) -> dict:
        """Give both models of a sequence-to-sequence task the same decoder inputs, made from the labels as usual."""
        config = getattr(plain_model(student), "config", None)
        if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in inputs or "labels" not in inputs:
            return inputs
        decoder_input_ids = plain_model(student).prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        return {**inputs, "decoder_input_ids": decoder_input_ids}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher reads, too."""
        super()._set_signature_columns_if_needed()
        for teacher in teachers_of(self.teacher):
            is_cached = isinstance(teacher, CachedTeacher)
            theirs = teacher.columns if is_cached else inspect.signature(plain_model(teacher).forward).parameters
            self._signature_columns += [name for name in theirs if name not in self._signature_columns]


def projection(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """A learned map from the student's width to the teacher's; nothing to learn where they are equal."""
    mine, theirs = plain_model(student).config.hidden_size, plain_model(teacher).config.hidden_size
    return nn.Identity() if mine == theirs else nn.Linear(mine, theirs, bias=False)


def accepted(model: nn.Module, inputs: dict) -> dict:
    """The inputs that `model` knows by name: student and teacher may differ in them (token_type_ids)."""
    parameters = inspect.signature(plain_model(model).forward).parameters
    return {name: value for name, value in inputs.items() if name in parameters}
