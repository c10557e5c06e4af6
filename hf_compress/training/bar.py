"""One bar for a training in place of the Trainer's bars and its lines of raw figures."""

import logging

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_compress.training.progress import progress_bar
from hf_compress.training.ranks import is_main

logger = logging.getLogger(__name__)

FEW_LOSSES = 4  # lines of a training in a file


class TrainingBar(TrainerCallback):
    """One bar for a training, with its loss; in a file, the loss a few times."""

    def __init__(self, desc: str):
        self.desc, self.bar, self.told = desc, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress_bar(total=state.max_steps, initial=state.global_step, desc=self.desc, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {name: f"{logs[name]:.4g}" for name in ("loss", "eval_loss") if name in logs or {}}
        if not figures or self.bar is None or not is_main():
            return
        self.bar.set_postfix(figures)
        part = FEW_LOSSES * state.global_step // max(state.max_steps, 1)
        if self.bar.disable and part > self.told:
            self.told = part
            told = ", ".join(f"{name} {figure}" for name, figure in figures.items())
            logger.warning("    step %d of %d: %s", state.global_step, state.max_steps, told)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def with_own_bar(trainer: Trainer, desc: str) -> Trainer:
    """Changes `trainer`: its bars and its lines of figures give way to a `TrainingBar`. Returns it."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(TrainingBar(desc))
    return trainer
