"""The losses of a student's predictions: to the labels, and to what its teacher predicts."""

import torch
from torch import Tensor
from transformers import Trainer

from hf_compress.distillation.losses.sums import (
    Loss,
    binary_soft_loss,
    drawn_loss,
    label_loss,
    logit_loss,
    soft_loss,
    span_loss,
)
from hf_compress.distillation.prompts import changes_positions
from hf_compress.distillation.runs import Run
from hf_compress.distillation.teachers.draws import DRAWN
from hf_compress.distillation.teachers.several_teachers import Kind
from hf_compress.model.tasks import problem_of


class PredictionLosses(Trainer):
    """For trainers with `self.task` and a `DistillationConfig`."""

    def prediction_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        """The task loss and the distance to the teacher's predictions, shared by `alpha`."""
        alpha, losses = self.args.alpha, {}
        if alpha < 1:
            losses["task_loss"] = Loss(self.task_loss(student, inputs), "label", 1 - alpha)
        if alpha > 0:
            losses["soft_loss"] = Loss(self.teacher_loss(student, teacher, inputs), "prediction", alpha)
        return losses

    def teacher_loss(self, student: Run, teacher: Run, inputs: dict) -> Tensor:
        """The distance to the teacher's predictions, or to what was drawn from them."""
        if "drawn_classes" not in teacher.outputs:
            return self.soft_loss(student.logits, teacher.logits)
        drawn = [self.task.logits({"logits": teacher.outputs[name]}, inputs) for name in DRAWN]
        return drawn_loss(student.logits[..., : self.teacher.manifest["classes"]], *drawn)

    def task_loss(self, student: Run, inputs: dict) -> Tensor:
        """The student's own loss on the labels, as a sum over those that are there; 0 where none is."""
        outputs, count = student.outputs, self.task.count(inputs)["label"]
        if self.task.kind == "spans" and "start_positions" in inputs:
            positions = (inputs[f"{side}_positions"] for side in ("start", "end"))
            return span_loss(outputs["start_logits"], outputs["end_logits"], *positions)
        if self.task.kind == "tokens" and "labels" in inputs and changes_positions(self.model):
            return label_loss(self.task.logits(outputs, inputs), self.task.labels(inputs))
        if self.label_smoother is not None and "labels" in inputs:
            if count == 0:  # its gradient would be NaN
                return outputs["logits"].sum() * 0
            loss = self.label_smoother(outputs, inputs["labels"], shift_labels=self.task.is_shifted)
        else:
            loss = outputs.get("loss")
        if loss is None:
            missing = "the model gives no loss" if "labels" in inputs else "the batch has no labels"
            raise ValueError(
                f"alpha={self.args.alpha} mixes in the task loss, but {missing} (columns: {sorted(inputs)}). "
                "Add what is missing, or set alpha=1 to learn from the teacher alone."
            )
        return torch.where(count > 0, loss * count, torch.zeros_like(loss))  # the mean over no labels is NaN

    @property
    def prediction_kind(self) -> Kind:
        """What is compared: probabilities by softmax or by sigmoid, or the logits."""
        kind, problem = self.args.prediction_loss, problem_of(self.model)
        if kind == "logits" or (kind == "auto" and problem == "regression"):
            return "logits"
        return "binary" if problem == "several_labels" else "soft"

    def kind_of(self, logits: Tensor) -> Kind:
        """`prediction_kind`, but of a model of one's own that gives each example one number, (B, 1): that number."""
        kind = self.prediction_kind
        return "logits" if kind == "soft" and logits.shape[-1] == 1 else kind

    def soft_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        kind = self.kind_of(student_logits)
        classes = min(student_logits.shape[-1], teacher_logits.shape[-1])  # beyond it is padding of a vocabulary
        mine, theirs = student_logits[..., :classes], teacher_logits[..., :classes]
        if kind == "logits":
            loss = logit_loss(mine, theirs)
        else:
            loss = (soft_loss if kind == "soft" else binary_soft_loss)(mine, theirs, self.args.temperature)
        return loss / 2 if self.task.kind == "spans" else loss  # a start and an end for each example
