"""Word-level distillation of language models: the distance to the teacher at each position, no logits kept.

Kim and Rush, 2016, https://arxiv.org/abs/1606.07947 (forward KL); Gu et al., 2023, https://arxiv.org/abs/2306.08543
(reverse KL); Agarwal et al., 2023, https://arxiv.org/abs/2306.13649 (Jensen-Shannon)

    loss = (1 - alpha) * cross entropy + alpha * temperature^2 * divergence, means over the predicted positions
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.heads import head_only_on, output_head
from hf_compress.distillation.losses.chunked_head import head_losses
from hf_compress.distillation.losses.divergences import (
    drawn_forward_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    top_k_forward_kl,
)
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.prompts import changes_positions, prompt_length
from hf_compress.distillation.runs import Run
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.draws import DRAWN
from hf_compress.distillation.teachers.sharded_teacher import gathered
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.tasks import LANGUAGE_MODELS, auto_class_name, plain_model

TOP_K = "top_logits", "top_indices", "rest"
MOST_ROUNDING = 2e-2  # of the norm of logits, which autocast gives the digits of bfloat16
DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen-shannon": jensen_shannon}


@dataclass
class WordLevelConfig(DistillationConfig):
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits before softmax; above 0."})
    divergence: str = field(
        default="forward",
        metadata={
            "help": "Distance to the teacher p_t: `forward` for KL(p_t || p_s), `reverse` for KL(p_s || p_t), "
            "`jensen-shannon` for both to their mixture."
        },
    )
    jensen_shannon_beta: float = field(
        default=0.5, metadata={"help": "Share of the teacher in the mixture, between 0 and 1, only jensen-shannon."}
    )
    chunk_size: int = field(
        default=256, metadata={"help": "Positions whose logits are held together; changes memory, not the loss."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {sorted(DIVERGENCES)}, got {self.divergence!r}.")
        if not 0 < self.jensen_shannon_beta < 1:
            raise ValueError(
                f"jensen_shannon_beta must lie between 0 and 1, got {self.jensen_shannon_beta}: at 0 and 1 the "
                "distance is always 0. Use divergence=`forward` or `reverse`."
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size counts positions and must be 1 or more, got {self.chunk_size}.")
        if not self.alpha:
            raise ValueError("alpha is 0, so nothing would be learnt from the teacher: set it above 0.")
        if self.prediction_loss == "logits" or self.teacher_noise or self.label_smoothing_factor or self.torch_compile:
            raise ValueError(
                "Word-level distillation never holds all logits: prediction_loss=`logits`, teacher_noise, "
                "label_smoothing_factor and torch_compile do not go with it. Use DistillationTrainer for them."
            )


class WordLevelTrainer(DistillationTrainer):
    """For language models with an `nn.Linear` head that makes the logits alone. Needs neither model's logits in memory.

    The student's own loss is computed here, as cross entropy over the labels. Evaluation that wants predictions
    (`compute_metrics`, `predict`) holds the student's logits, as always.
    """

    config_class = WordLevelConfig
    _keeps_logits = False  # while predictions are collected
    _is_checked = False  # the heads make the logits alone
    needs_logits = False  # of whole batches

    def check_layers(self) -> None:
        super().check_layers()
        if (self.is_fsdp_enabled and not self.accelerator.is_fsdp2) or self.is_deepspeed_enabled:
            raise ValueError(
                f"{type(self).__name__} needs the whole head in each process, which FSDP1 and DeepSpeed cut into "
                "shards. Use FSDP2 (fsdp_version: 2), DDP, or DistillationTrainer."
            )
        if isinstance(self.teacher, CachedTeacher):
            self._check_cache(self.teacher)
        for model in self._with_heads:
            if auto_class_name(model) not in LANGUAGE_MODELS:
                raise ValueError(
                    f"{type(self).__name__} needs language models, got {type(plain_model(model)).__name__}. Load "
                    f"it with one of {', '.join(LANGUAGE_MODELS)}, or use DistillationTrainer."
                )
        head = output_head(self.model)
        if not self.takes_head(head):
            raise ValueError(
                f"{type(self).__name__} differentiates the student's head by hand and needs an nn.Linear, got "
                f"{type(head).__name__}. Leave the head out of adapters and quantization, or use DistillationTrainer."
            )
        beta = self.args.jensen_shannon_beta
        is_mixture = self.args.divergence == "jensen-shannon"
        self.divergence = partial(jensen_shannon, beta=beta) if is_mixture else DIVERGENCES[self.args.divergence]

    def takes_head(self, head: nn.Module) -> bool:
        """Whether the gradient of what the student's head makes can be written by hand."""
        return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward

    @property
    def _with_heads(self) -> list[nn.Module]:
        return [self.model] if isinstance(self.teacher, CachedTeacher) else [self.model, self.teacher]

    def _check_cache(self, teacher: CachedTeacher) -> None:
        top_k, draws = teacher.manifest["top_k"], teacher.manifest["draws"]
        if not (top_k or draws):
            return
        if self.args.divergence != "forward":
            raise ValueError(
                f"divergence={self.args.divergence!r} needs all of the teacher's logits, but the cache in "
                f"{teacher.path} holds {f'{draws} draws' if draws else f'the {top_k} largest'}. Use "
                "divergence='forward', or the teacher itself."
            )
        mine, theirs = output_head(self.model).weight.shape[0], teacher.manifest["classes"]
        if mine != theirs:
            raise ValueError(
                f"The student's head has {mine} classes and the teacher of the cache in {teacher.path} {theirs}. "
                "Resize the student's embeddings, or use DistillationTrainer."
            )

    def student_inputs(self, student: nn.Module, inputs: dict) -> dict:
        return {k: v for k, v in super().student_inputs(student, inputs).items() if k not in self._label_columns}

    def compute_loss(self, model, inputs, *args, **kwargs):
        student = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        with ExitStack() as heads:
            mine = heads.enter_context(head_only_on(student, _all if self._keeps_logits else _first))
            is_cached = isinstance(self.teacher, CachedTeacher)
            theirs = [] if is_cached else heads.enter_context(head_only_on(self.teacher, _first))
            self._states = mine, theirs
            return super().compute_loss(model, inputs, *args, **kwargs)

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        # The backward pass needs the student's, and lets go of it.
        with gathered(self.teacher), gathered(self.model, keep=self.model.training):
            return self._losses(student, teacher, inputs)

    def _losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        args, (mine, theirs) = self.args, self._states  # each [(B, T, D)], or [] for a cache
        if not self._is_checked:
            for model, run, seen in zip(self._with_heads, (student, teacher), self._states, strict=False):
                _check_logits(model, seen[0], run.outputs["logits"])
            self._is_checked = True
        counted = self.task.counted(inputs)  # (B, T), or one shorter
        mine = [states[:, _prompt(self.model) :] for states in mine]
        theirs = [states[:, _prompt(self.teacher) :] for states in theirs]
        theirs = theirs or [teacher.outputs[name] for name in ("logits", *TOP_K, *DRAWN) if name in teacher.outputs]
        states, *of_teacher = (own[:, : counted.shape[1]][counted] for own in (*mine, *theirs))  # (M, ...)
        labels = None
        if args.alpha < 1:
            if "labels" not in inputs:
                raise ValueError(
                    f"alpha={args.alpha} mixes in the task loss, but the batch has no labels: its columns are "
                    f"{sorted(inputs)}. Add labels, or set alpha=1 to learn from the teacher alone."
                )
            labels = self.task.labels(inputs)
        total, task, soft = head_losses(
            states,
            output_head(self.model),
            [one.to(states.device) for one in of_teacher],
            None if isinstance(self.teacher, CachedTeacher) else output_head(self.teacher),
            labels,
            self.divergence,
            temperature=args.temperature,
            task_weight=1 - args.alpha,
            soft_weight=args.alpha,
            chunk_size=args.chunk_size,
            known=drawn_forward_kl if "drawn_classes" in teacher.outputs else top_k_forward_kl,
        )
        losses = {} if labels is None else {"task_loss": Loss(task, "label", 1 - args.alpha)}
        # Both parts' gradient is that of `total`: a term of value zero carries it, at the weight of the soft loss.
        losses["soft_loss"] = Loss(soft + (total - total.detach()) / args.alpha, "label", args.alpha)
        return self.with_terms(losses, student, teacher, inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._keeps_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._keeps_logits = False


def _prompt(model: nn.Module) -> int:
    """Virtual tokens before those that the head reads."""
    return prompt_length(model) if changes_positions(model) else 0


def _first(states: Tensor) -> Tensor:
    return states[:1, :1]


def _all(states: Tensor) -> Tensor:
    return states


@torch.no_grad()
def _check_logits(model: nn.Module, states: Tensor, logits: Tensor) -> None:
    """Raise ValueError where a model does more to its logits than its head does (Gemma 2 caps them)."""
    # of as many tokens as the model gave: a packed head may round the inputs of many, and not those of few
    alone = output_head(model).forward(states if logits.shape[:-1] == states.shape[:-1] else _first(states))
    alone, given = (_first(each).float() for each in (alone, logits))
    if logits.ndim != 3 or not float((alone - given).norm()) <= MOST_ROUNDING * float(given.norm()):
        raise ValueError(
            f"{type(plain_model(model)).__name__} changes its logits after the head (caps, scales or shifts them), so "
            "they cannot be made in chunks. Use DistillationTrainer, which takes them as they are."
        )
