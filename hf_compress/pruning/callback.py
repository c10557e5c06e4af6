"""The base of the pruning callbacks: masks that follow a schedule, in any `Trainer`.

After each optimizer step what is masked is set to zero again, so no loss, model or hook has to know of masks. With our
trainers masks and scores live in the `TrainingState` and survive resume; with a stock `Trainer` masks are found again
in the zeros of the weights, and scores that are gathered over steps cannot be resumed.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_compress.model.attention import Projection
from hf_compress.model.unfinished import forms_of
from hf_compress.pruning.masks import Blocks, check_prunable
from hf_compress.pruning.schedules import THRESHOLDS, Schedule, check_schedule, make_schedule
from hf_compress.pruning.scores import Magnitude, Score
from hf_compress.pruning.selection import SCOPES, grow_steepest, keep_above, keep_largest
from hf_compress.surgery.transaction import Transaction
from hf_compress.training.callback import PieceCallback
from hf_compress.training.checks import check_own_gradients
from hf_compress.training.pieces import Piece
from hf_compress.training.shards import cut_like, is_sharded, over_ranks, own, whole
from hf_compress.training.state import STATE_NAME, TrainingState

logger = logging.getLogger(__name__)


class Pruning(PieceCallback):
    """Base of callbacks that prune while a `Trainer` trains.

    Args:
        sparsity: share that is gone at the end, 0 to 1.
        schedule: `cubic` (gradually, ever slower), `one-shot` (all at `begin`), `two-slopes` (a rising threshold), or
            `fixed` (a threshold that stays).
        begin, end: shares of the training, in optimizer steps, at which pruning begins and is done.
        num_updates: how often masks are updated on the way.
        regrow: share of the training after which everything may grow again (DSD); never when None.
        grow: of what stays, the share that is not the largest but has the steepest gradients among what was held back;
            it grows from zero until the next update. With `cubic`, at all updates but the last, and a score of weights.

    Raises ValueError for settings that no training could follow, at once where possible, else when training begins.
    """

    name = "pruning"  # also of its entries in the training state
    cuts_silent = True
    scope = "class-blind"
    bank_size: int | None = None
    num_elements = 1  # of a block, for the slopes

    def __init__(
        self,
        sparsity: float,
        *,
        score: Score,
        schedule: str = "cubic",
        begin: float = 0.1,
        end: float = 0.7,
        num_updates: int = 20,
        regrow: float | None = None,
        grow: float = 0.0,
    ):
        check_schedule(schedule, sparsity, begin, end, num_updates)
        if regrow is not None and not (begin if schedule == "one-shot" else end) < regrow <= 1:
            raise ValueError(f"regrow must lie between the end of pruning ({end}) and 1, got {regrow}.")
        if schedule in THRESHOLDS and not (isinstance(score, Magnitude) and score.reduce == "max"):
            raise ValueError(
                f"schedule={schedule!r} is a threshold on magnitudes: use it with the magnitude (max) score."
            )
        if not 0 <= grow < 1 or (grow and (schedule != "cubic" or score.is_gathered)):
            raise ValueError(
                "grow is a share below 1 of what stays, with schedule='cubic' and a score told from weights alone: "
                f"got grow={grow}, schedule={schedule!r} and {type(score).__name__}."
            )
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}.")
        self.sparsity, self.schedule, self.begin, self.end = sparsity, schedule, begin, end
        self.num_updates, self.regrow, self.grow, self.score = num_updates, regrow, grow, score
        self._matrices: list[Blocks] = []
        self._handles: list[Any] = []
        self._schedule: Schedule | None = None
        self._regrow_at: int | None = None

    # What the methods override

    def matrices(self, model: nn.Module) -> list[Blocks]:
        """The matrices to prune and their blocks. Raises ValueError if `model` has none that fit."""
        raise NotImplementedError

    def shrink(self, learning_rate: float) -> None:
        """A proximal step of the method's penalty, after each optimizer step while the schedule runs."""

    def check(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        check_prunable(model, type(self).__name__)
        check_cuts(model, [matrix.module for matrix in self.matrices(model)])

    def is_done(self, step: int) -> bool:
        return self._schedule is not None and step >= (self._regrow_at or self._schedule.end)

    # State

    def training_state_entries(self, model: nn.Module) -> dict[str, Tensor]:
        """What this callback keeps in the `TrainingState`: masks, and scores that are gathered over steps."""
        self._matrices = self.matrices(model)
        entries = {}
        for i, matrix in enumerate(self._matrices):
            entries[f"{self.name}_mask_{i}"] = torch.ones(matrix.grid, dtype=torch.bool)
            if (buffer := self.score.buffer(matrix)) is not None:
                entries[f"{self.name}_score_{i}"] = buffer
            if self.schedule in THRESHOLDS:
                entries[f"{self.name}_quantile_{i}"] = torch.full((), torch.nan)
        return entries

    @property
    def masks(self) -> dict[str, Tensor]:
        """Module name -> boolean (rows, columns) of blocks, True for those that stay.

        Under FSDP2 all ranks have to ask, for this as for `current_sparsity`.
        """
        return {matrix.name: whole(self._kept("mask", i)) for i, matrix in enumerate(self._matrices)}

    @property
    def current_sparsity(self) -> float:
        """The share of the matrices' weights that is masked now."""
        gone = total = 0
        for i, matrix in enumerate(self._matrices):
            mask, size = self._kept("mask", i), matrix.shape[0] * matrix.shape[1]
            gone += size * int(over_ranks((~own(mask)).sum(), mask))
            total += size * mask.numel()
        return gone / max(total, 1)

    def _kept(self, kind: str, number: int) -> Tensor | None:
        return getattr(self._state, f"{self.name}_{kind}_{number}", None)

    # Events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module = None, **kwargs
    ) -> None:
        check_own_gradients(args, "Pruning")
        super().on_train_begin(args, state, control, model=model)
        self._state = getattr(model, STATE_NAME, None)
        if self._state is None:
            self._state = self._state_of_stock_trainer(model, state)
        elif f"{self.name}_mask_0" not in dict(self._state.named_buffers()):
            raise ValueError(f"This trainer does not know of {type(self).__name__}: pass it as callbacks=[...].")
        self._cut_state()
        self._schedule = make_schedule(
            self.schedule, self.sparsity, begin=self.begin, end=self.end, num_updates=self.num_updates,
            max_steps=state.max_steps, first_step=int(self.score.is_gathered), num_elements=self.num_elements,
        )  # fmt: skip
        self._regrow_at = None if self.regrow is None else round(self.regrow * state.max_steps)
        self.close()
        self._handles = self.score.open(model, self._matrices)
        self._find_masked()
        if state.global_step == 0 and self._schedule.updates_at(0):
            self._update(0)

    def on_pre_optimizer_step(self, args, state: TrainerState, control, **kwargs) -> None:
        if not (self.score.is_gathered and state.global_step < self._schedule.end):
            return
        with torch.no_grad():
            for i, matrix in enumerate(self._matrices):
                self.score.gather(i, matrix, self._kept("score", i))

    def on_optimizer_step(self, args, state: TrainerState, control, optimizer=None, **kwargs) -> None:
        step = state.global_step + 1
        with torch.no_grad():
            if self._schedule.begin < step <= self._schedule.end:
                self.shrink(optimizer.param_groups[0]["lr"])
            self._apply(optimizer)
            if step == self._regrow_at:
                for i in range(len(self._matrices)):
                    self._kept("mask", i).fill_(True)
                self._masked = []
            elif self._schedule.updates_at(step):
                self._update(step, optimizer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._find_masked()  # the best checkpoint may have been loaded, and its masks with it
        self.close()
        if not self.is_done(state.global_step):
            logger.warning(
                "The training ended early, after step %d: %s has masked %.4f of the weights, and %.4f were asked for.",
                state.global_step, type(self).__name__, self.current_sparsity, self.sparsity,
            )  # fmt: skip

    # Inside

    def _update(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        numbers, level = range(len(self._matrices)), self._schedule.level(step)
        scores = [self.score.scores(i, self._matrices[i], self._kept("score", i)) for i in numbers]
        if self.schedule in THRESHOLDS:
            masks = keep_above(scores, [level * self._quantile(i) for i in numbers])
        else:
            if self.scope == "class-distribution":
                scores = [
                    score / float(whole(self._matrices[i].weight).float().std()) for i, score in enumerate(scores)
                ]
            slopes = [matrix.gradient for matrix in self._matrices]
            is_growing = self.grow and step < self._schedule.end and all(slope is not None for slope in slopes)
            share, of = (
                self.grow * (1 - level) if is_growing else 0.0,
                {"scope": self.scope, "bank_size": self.bank_size},
            )
            masks = keep_largest(scores, level + share, **of)
            if share:
                slopes = [m.largest(slope.abs()) for m, slope in zip(self._matrices, slopes, strict=True)]
                masks = grow_steepest(masks, slopes, share, **of)
        for i, mask in zip(numbers, masks, strict=True):
            self._kept("mask", i).copy_(mask)
            if self.score.forgets:
                self._kept("score", i).zero_()
        self._find_masked()
        self._apply(optimizer)
        logger.info("%s: %.4f of the weights masked after step %d", type(self).__name__, self.current_sparsity, step)

    def _quantile(self, number: int) -> Tensor:
        """q of `TwoSlopes`, measured when first asked for."""
        kept = self._kept("quantile", number)
        if kept.isnan():
            magnitudes = whole(self._matrices[number].weight).abs().float().flatten()
            kept.copy_(magnitudes.kthvalue(max(int(self.sparsity * magnitudes.numel()), 1)).values)
        return kept

    def _find_masked(self) -> None:
        """Matrices of which this rank has something masked."""
        self._masked = [i for i in range(len(self._matrices)) if not bool(own(self._kept("mask", i)).all())]

    def _apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        for i in self._masked:
            if self._regrow_at is None:
                self._matrices[i].silence_(self._kept("mask", i), optimizer)
            else:  # with zeros on both sides nothing could grow again
                self._matrices[i].scale_(self._kept("mask", i), optimizer)

    def _cut_state(self) -> None:
        """Masks and scores of single weights lie beside them: under FSDP2 each rank has those of its weights."""
        for i, matrix in enumerate(self._matrices):
            for kind in ("mask", "score"):
                kept = self._kept(kind, i)
                if kept is not None and kept.shape == matrix.weight.shape and not is_sharded(kept):
                    setattr(self._state, f"{self.name}_{kind}_{i}", cut_like(kept, matrix.weight))

    def _state_of_stock_trainer(self, model: nn.Module, state: TrainerState) -> TrainingState:
        made = TrainingState()
        for name, value in self.training_state_entries(model).items():
            made.add(name, value)
        made.to(self._matrices[0].weight.device)
        if state.global_step > 0:
            if self.score.is_gathered or self.schedule in THRESHOLDS:
                raise ValueError(
                    f"{type(self).__name__} gathers scores over steps, and a stock Trainer keeps none in its "
                    "checkpoints: it cannot be resumed. Train with one of the trainers of hf_compress, or start anew."
                )
            for i, matrix in enumerate(self._matrices):
                getattr(made, f"{self.name}_mask_{i}").copy_(whole(matrix.is_alive()))
        return made

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def check_cuts(
    model: nn.Module, modules: Iterable[Projection], matrices: Sequence[Blocks] = (), advice: str = ""
) -> None:
    """Raise ValueError, before the first step, for maps whose zeros would be lost or that could not be cut.

    Those are packed, wrapped and shared ones, and of `matrices` those whose quantizer would be cut inside a group.
    """
    transaction, forms = Transaction(model), forms_of(model)
    for module in dict.fromkeys(modules):
        if module not in forms:
            transaction.check(module)
    for matrix in matrices:
        group = forms[matrix.module].column_unit if matrix.module in forms else 1
        if matrix.shape[1] % group:
            raise ValueError(
                f"{matrix.name} would lose {matrix.shape[1]} columns at a time, but {group} of them share a scale, and "
                f"a group cannot be cut in the middle. {advice.format(columns=matrix.shape[1], group=group)}"
            )


def per_matrix_importance(importance: Tensor, matrices: Sequence[Blocks], what: str) -> Tensor:
    """The importance given by a user, checked against the model: (L, n), nan where a layer has fewer than n."""
    counts = [matrix.grid[1] for matrix in matrices]
    if importance.dim() != 2 or len(importance) != len(counts):
        raise ValueError(f"importance must be ({len(counts)}, {max(counts)}), got {tuple(importance.shape)}.")
    known = (~importance.isnan()).sum(dim=1).tolist()
    if known != counts:
        raise ValueError(f"importance must tell of {counts} {what} in each layer, got {known}.")
    return importance
