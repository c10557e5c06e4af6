"""Divides each loss by its items in a whole optimiser step, and logs it under its own name."""

import torch
from torch import Tensor

from hf_compress.distillation.losses.sums import Loss
from hf_compress.training.step_counts import StepCountsMixin


class ItemsMixin(StepCountsMixin):
    """For trainers whose losses are sums over items."""

    counts_items = True

    def __init__(self, *args, **kwargs):
        self._train_terms: dict[str, Tensor] = {}  # sums over the steps since the last log
        self._train_steps: dict[str, set[int]] = {}  # the steps that had the term: phases differ in their terms
        self._eval_terms: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(*args, **kwargs)

    def total(self, losses: dict[str, Loss], counts: dict[str, Tensor], *, training: bool) -> Tensor:
        """The weighted sum of `losses`, each divided by its items in the whole step; `counts` are this batch's own.

        DDP averages gradients over the ranks, so the sum over all ranks is restored here.
        """
        whole = self._step_counts if training and self._step_counts is not None else counts
        values = {name: loss.sum / whole[loss.per].clamp(min=1) for name, loss in losses.items()}
        for name, loss in losses.items():
            if training:
                self._train_terms[name] = self._train_terms.get(name, 0.0) + values[name].detach()
                self._train_steps.setdefault(name, set()).add(self.state.global_step)
            else:
                total, items = self._eval_terms.get(name, (0.0, 0.0))
                self._eval_terms[name] = (total + loss.sum.detach(), items + counts[loss.per])
        weighted = torch.stack([loss.weight * values[name] for name, loss in losses.items()]).sum()
        return weighted * self.accelerator.num_processes if training and self._step_counts is not None else weighted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_terms:
            sums = self.accelerator.reduce(torch.stack(list(self._train_terms.values())), reduction="sum").tolist()
            steps = [len(self._train_steps[name]) for name in self._train_terms]
            logs.update({n: value / s for n, value, s in zip(self._train_terms, sums, steps, strict=True)})
            self._train_terms, self._train_steps = {}, {}
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_terms = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, pair in self._eval_terms.items():
            total, items = self.accelerator.reduce(torch.stack(pair), reduction="sum")
            output.metrics[f"{metric_key_prefix}_{name}"] = (total / items.clamp(min=1)).item()
        return output

    def _inner_training_loop(self, *args, **kwargs):
        self._train_terms, self._train_steps = {}, {}
        return super()._inner_training_loop(*args, **kwargs)
