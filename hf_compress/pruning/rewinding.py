"""Rewinding: when pruning is done the weights go back to those of an early step, under the masks of the last.

Frankle and Carbin, 2019, https://arxiv.org/abs/1803.03635 (to the start); Frankle et al., 2019,
https://arxiv.org/abs/1903.01611 (to an early step, which large models need). What is trained after that is the "winning
ticket": with as many steps left as a training has, it shows what its structure alone is worth.
"""

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_compress.pruning.callback import Pruning
from hf_compress.training.callback import PieceCallback
from hf_compress.training.shards import cut_like, is_sharded, own
from hf_compress.training.state import STATE_NAME


class Rewinding(PieceCallback):
    """Callback for the trainers of hf_compress, after the pruning that it belongs to in the list of callbacks.

    Args:
        pruning: the pruning whose masks stay; the weights go back after its last update.
        to: share of the training to whose weights they go back, not after pruning begins; 0 is the start.

    What is zero when pruning is done stays zero. The optimizer's averages start anew; the learning rate goes on as it
    would. The weights that wait are saved with each checkpoint.
    """

    name = "rewinding"

    def __init__(self, pruning: Pruning, to: float = 0.0):
        if not isinstance(pruning, Pruning):
            raise TypeError(
                f"Rewinding belongs to a pruning with masks such as hfc.WeightPruning, got {pruning!r:.60}."
            )
        if not 0 <= to <= pruning.begin or pruning.regrow is not None:
            raise ValueError(
                f"The weights go back to a step from 0 to the beginning of pruning (to={to}, begin={pruning.begin}), "
                f"and nothing may grow again afterwards (regrow={pruning.regrow})."
            )
        self.pruning, self.to = pruning, to
        self._saved_at = self._end = 0

    def training_state_entries(self, model: nn.Module) -> dict[str, Tensor]:
        return {f"{self.name}_{i}": p.detach().clone() for i, p in enumerate(model.parameters())}

    def is_done(self, step: int) -> bool:
        return step >= self._end > 0

    def on_train_begin(self, args: TrainingArguments, state, control, model: nn.Module = None, **kwargs) -> None:
        super().on_train_begin(args, state, control, model=model)
        self._state = getattr(model, STATE_NAME, None)
        if not hasattr(self._state, f"{self.name}_0"):
            raise ValueError(
                "Rewinding keeps weights in the checkpoints, which a stock Trainer does not: pass it as "
                "callbacks=[...] to a trainer of hf_compress."
            )
        if self.pruning._schedule is None:
            raise ValueError(
                "Rewinding comes after its pruning in the list of callbacks, and both are in the same list."
            )
        self._parameters = [p for name, p in model.named_parameters() if not name.startswith(f"{STATE_NAME}.")]
        for i, parameter in enumerate(self._parameters):
            kept = getattr(self._state, f"{self.name}_{i}")
            if not is_sharded(kept):  # FSDP2 has cut the weights since the trainer was made
                setattr(self._state, f"{self.name}_{i}", cut_like(kept, parameter))
        self._saved_at, self._end = round(self.to * state.max_steps), self.pruning._schedule.end
        if state.global_step == 0 == self._saved_at:
            self._save()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        step = state.global_step + 1
        if step == self._saved_at:
            self._save()
        if step == self._end:
            self._rewind(optimizer)

    @torch.no_grad()
    def _save(self) -> None:
        for i, parameter in enumerate(self._parameters):
            own(getattr(self._state, f"{self.name}_{i}")).copy_(own(parameter))

    @torch.no_grad()
    def _rewind(self, optimizer: torch.optim.Optimizer | None) -> None:
        for i, parameter in enumerate(self._parameters):
            mine = own(parameter)
            mine.copy_(own(getattr(self._state, f"{self.name}_{i}")).masked_fill(mine == 0, 0))
        if optimizer is not None:
            optimizer.state.clear()
