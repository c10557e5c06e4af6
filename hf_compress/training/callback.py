"""The base of callbacks that leave something to finish."""

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_compress.training.finish import finish
from hf_compress.training.pieces import Piece, join


class PieceCallback(Piece, TrainerCallback):
    """A piece that works while a `Trainer` trains, one of Transformers or one of ours.

    While it is not done, no evaluation counts for the best checkpoint: what a model reaches before it is pruned, or
    with more bits, is no measure for what it will be. The patience of an early stopping begins when it is done.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module = None, **kwargs
    ) -> None:
        join(model, self)

    def on_step_begin(self, args, state: TrainerState, control, **kwargs) -> None:
        if not self.is_done(state.global_step):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def finish(self, model: nn.Module) -> nn.Module:
        """`hfc.finish(model)`, which ends this and everything else that training left open."""
        return finish(model)
