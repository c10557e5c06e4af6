"""Divides losses once, by what there is in all micro-batches and on all ranks of an optimizer step.

`Trainer` does so for models that divide by `num_items_in_batch`. It believes that of each forward with **kwargs, but
most encoders, and every classifier of a decoder, give the mean over their batch: such means were added up, not
averaged, and a batch of few labels weighed as much as one of many.
"""

import torch
from torch import Tensor
from transformers import Trainer

from hf_compress.model.tasks import Task
from hf_compress.training.checks import has_own_mean

UNITS = ("example", "token", "label", "prediction")


class StepCountsMixin(Trainer):
    """A `Trainer` that knows how many items of each unit the running step has, over its micro-batches and ranks.

    A model's own mean over a batch counts by the batch's share of the step's labels, so that the gradient is that of
    one batch that holds them all. What a subclass or the user computes is divided there.
    """

    task: Task
    _step_counts: dict[str, Tensor] | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.task = Task.of(self.model)
        divides = getattr(self, "loss_is_scaled_for_ga", None) is not None
        self._gives_mean = not divides and self.compute_loss_func is None and has_own_mean(self.model)
        if self._gives_mean:
            self.model_accepts_loss_kwargs = False
        if divides and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.compute_loss_func = self.compute_loss  # 5.17 leaves a loss undivided if there is such a function

    @property
    def counts_items(self) -> bool:
        """Whether a loss of this training is divided by what is counted here."""
        return self._gives_mean

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.counts_items:
            counts = torch.zeros(len(UNITS), device=device)
            for inputs in samples:
                counts += torch.stack([self.task.count(inputs)[unit] for unit in UNITS]).to(device)
            counts = self.accelerator.reduce(counts, reduction="sum")
            self._step_counts = dict(zip(UNITS, counts, strict=True))
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`; in a training step, a mean over labels counts by its share of the step's labels."""
        is_part = self._gives_mean and self._step_counts is not None and model.training
        own = self.task.count(inputs)["label"] if is_part else None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if is_part:
            loss = torch.where(own > 0, loss * own, torch.zeros_like(loss))  # the mean over no labels is NaN
            loss = loss / self._step_counts["label"].clamp(min=1)
            # DDP averages gradients over the ranks, and `Trainer` divides by the micro-batches
            loss = loss * self.accelerator.num_processes * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _inner_training_loop(self, *args, **kwargs):
        self._step_counts = None
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._step_counts = None
