"""Deep mutual learning: students teach one another, all in one run.

Zhang et al., 2018, https://arxiv.org/abs/1706.00384

    loss = sum over students k of (1 - alpha) * task loss_k + alpha * mean over l != k of KL(p_l || p_k)

The p_l are targets: no gradient flows into them (eq. 1 to 4; eq. 7 for more than two). All students learn in the same
step.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.distillation.config import DistillationConfig
from hf_compress.distillation.losses.sums import Loss
from hf_compress.distillation.runs import Run, accepted
from hf_compress.distillation.teachers.adapter_teacher import AdapterTeacher
from hf_compress.distillation.teachers.cached_teacher import CachedTeacher
from hf_compress.distillation.teachers.several_teachers import teachers_of
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.model.tasks import plain_model
from hf_compress.training.state import TrainingState


@dataclass
class MutualConfig(DistillationConfig):
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits before softmax; above 0."})

    def __post_init__(self):
        super().__post_init__()
        if self.teacher_weights or self.teacher_noise or self.hints or self.frozen_layers:
            raise ValueError(
                "In mutual learning no student is a teacher alone, and each learns whole: leave teacher_weights, "
                "teacher_noise, hints and frozen_layers out."
            )


class MutualTrainer(DistillationTrainer):
    """Trains `model` and its `peers` together.

    Args:
        peers: one or more other students, as models, names or folders. They are part of every checkpoint and resumed
            with it; save them with their own `save_pretrained` (`trainer.peers`). `save_model` saves `model`.

    Their losses are logged as `peer_1_task_loss`, `peer_1_soft_loss` and so on, and are part of the whole loss. Raises
    ValueError for peers that cannot be matched, and for a cache.
    """

    config_class = MutualConfig
    takes_terms = False
    _starts: Sequence[dict[str, Tensor]] = ()  # the peers' weights before training, kept where `model_init` begins anew

    def __init__(self, model=None, args=None, *positional, peers: Sequence[nn.Module | str | Path] = (), **kwargs):
        if isinstance(peers, nn.Module | str | Path) or not len(peers):
            raise ValueError(f"{type(self).__name__} needs a list of one or more peers, got {peers!r:.60}.")
        super().__init__(model, args, *positional, teacher_model=list(peers) if len(peers) > 1 else peers[0], **kwargs)

    def prepare_teacher(self, teacher: nn.Module) -> nn.Module:
        if unfit := [type(p).__name__ for p in teachers_of(teacher) if isinstance(p, CachedTeacher | AdapterTeacher)]:
            raise ValueError(f"Peers learn, so they must be models of their own, got {unfit[0]}.")
        if self.model_init is not None:
            self._starts = [copy.deepcopy(peer.state_dict()) for peer in teachers_of(teacher)]
        return teacher.to(self.args.device)

    def call_model_init(self, trial=None):
        """With a new model the peers, too, begin as they were given."""
        for peer, start in zip(self.peers if self._starts else (), self._starts, strict=True):
            peer.load_state_dict(start)
        return super().call_model_init(trial)

    @property
    def peers(self) -> tuple[nn.Module, ...]:
        return teachers_of(self.teacher)

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        state = super().make_training_state(model)
        for number, peer in enumerate(self.peers, start=1):
            state.add(f"peer_{number}", peer)
        return state

    def run_teacher(self, inputs: dict) -> Run:
        return Run({}, torch.empty(0), {}, {})  # peers run where their gradients are needed

    def teacher_logits(self, outputs, student_logits: Tensor, inputs: dict) -> Tensor:
        return torch.empty(0)

    def distillation_losses(self, student: Run, teacher: Run, inputs: dict) -> dict[str, Loss]:
        runs = [student]
        for peer in self.peers:
            peer.train(plain_model(self.model).training)
            with self.accelerator.autocast():  # a hook of the student's forward runs outside of it
                outputs = peer(**accepted(peer, inputs))
            runs.append(Run(outputs, self.task.logits(outputs, inputs), {}, {}))
        alpha, losses = self.args.alpha, {}
        for number, run in enumerate(runs):
            name = f"peer_{number}_" if number else ""
            if alpha < 1:
                losses[f"{name}task_loss"] = Loss(self.task_loss(run, inputs), "label", 1 - alpha)
            if alpha > 0:
                others = [other.logits.detach() for other in runs if other is not run]
                sums = torch.stack([self.soft_loss(run.logits, logits) for logits in others])
                losses[f"{name}soft_loss"] = Loss(sums.mean(), "prediction", alpha)
        return losses
