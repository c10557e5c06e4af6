"""The base of the pruning trainers: a `Trainer` with one pruning callback, which cuts when training is over."""

import inspect
from dataclasses import dataclass, field, fields

from transformers import TrainerCallback

from hf_compress.pruning.rewinding import Rewinding
from hf_compress.training.arguments import CompressionArguments, by_name, checked
from hf_compress.training.state import TrainingStateMixin


@dataclass
class PruningConfig(CompressionArguments):
    sparsity: float = field(default=0.5, metadata={"help": "Share that is gone at the end, at least 0 and below 1."})
    schedule: str = field(
        default="cubic",
        metadata={
            "help": "`cubic` (gradually, ever slower), `one-shot` (all at `begin`), `two-slopes` (a rising threshold), "
            "`fixed` (a threshold that stays)."
        },
    )
    begin: float = field(default=0.1, metadata={"help": "Share of the training at which pruning begins, 0 to 1."})
    end: float = field(default=0.7, metadata={"help": "Share of the training at which pruning is done, 0 to 1."})
    num_updates: int = field(default=20, metadata={"help": "How often masks are updated on the way; 1 or more."})
    rewind: float | None = field(
        default=None,
        metadata={"help": "When pruning is done, go back to the weights at this share of the steps (lottery ticket)."},
    )

    callback_class = None  # set by each method

    def __post_init__(self):
        super().__post_init__()
        _callbacks(self)  # checks the values

    def callback(self) -> TrainerCallback:
        """The callback that these settings describe."""
        taken = {name for kind in self.callback_class.__mro__ for name in inspect.signature(kind.__init__).parameters}
        return self.callback_class(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in taken})


def _callbacks(args: CompressionArguments) -> list[TrainerCallback]:
    """What the settings describe: the pruning first, and what goes with it."""
    pruning, rewind = args.callback(), getattr(args, "rewind", None)
    return [pruning] if rewind is None else [pruning, Rewinding(pruning, rewind)]


class PruningTrainer(TrainingStateMixin):
    """A `Trainer` that prunes while it trains; its arguments are those of `Trainer`.

    After `train()` the model is finished: what fell silent has been cut out, so `save_model` writes a small one. The
    callback is at hand as `pruning`.
    """

    config_class = PruningConfig

    def __init__(self, model=None, args=None, *positional, **kwargs):
        who = type(self).__name__
        args, kwargs = checked(args, self.config_class, who), by_name(positional, kwargs, who)
        self._own = _callbacks(args)
        self.pruning = self._own[0]
        callbacks = [*(kwargs.pop("callbacks", None) or []), *self._own]
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        _ = self.training_state  # built now, so that what is wrong with the model is said before training

    def _hp_search_setup(self, trial) -> None:
        """In a hyper-parameter search each trial has its own settings, and a callback made from them."""
        super()._hp_search_setup(trial)
        if trial is not None:
            for callback in self._own:
                self.remove_callback(callback)
            self._own = _callbacks(self.args)
            self.pruning = self._own[0]
            for callback in self._own:
                self.add_callback(callback)
