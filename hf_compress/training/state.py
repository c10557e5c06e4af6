"""The one owner of parameters that exist only for training: projections, gates, scores, step sizes.

While a trainer trains, its `TrainingState` is a submodule of the model, so that the optimiser, DDP and FSDP see it. It
is no part of the model's state dict, so no save of the model holds it; each checkpoint has it in a file of its own.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_compress.model.precision import attention_with_fast_gradients
from hf_compress.model.unfinished import check_weights, forms_of, pieces_of
from hf_compress.training.arguments import check_devices, dropping
from hf_compress.training.checks import data_fact, settings_facts, weights_fact
from hf_compress.training.finish import finish
from hf_compress.training.finite import find_not_finite, has_no_label, is_finite
from hf_compress.training.optimizers import add_missing
from hf_compress.training.pieces import Piece, check_pieces
from hf_compress.training.ranks import check_same
from hf_compress.training.resume import begin_checkpoint, end_checkpoint, find_fault, last_complete_checkpoint
from hf_compress.training.shards import check_loading, whole, write_
from hf_compress.training.step_counts import StepCountsMixin
from hf_compress.training.stream import StreamMixin

logger = logging.getLogger(__name__)

STATE_NAME = "hfc_training_state"  # the attribute of the model while it trains
STATE_FILE = "training_state.safetensors"  # beside optimizer.pt in a checkpoint


class TrainingState(nn.Module):
    """Training-only modules, parameters and buffers, by name. Their order is the optimiser's, so keep it."""

    def add(self, name: str, value: nn.Module | nn.Parameter | Tensor) -> nn.Module | nn.Parameter | Tensor:
        """Own `value`: a module, a parameter, or a tensor that is state but not learned (a mask). Returns it."""
        if isinstance(value, nn.Module):
            self.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value)
        return value

    def __len__(self) -> int:
        return len(self.state_dict())


def _strip(module, state_dict, prefix, local_metadata):
    for key in [k for k in state_dict if k.startswith(f"{prefix}{STATE_NAME}.")]:
        del state_dict[key]


def _do_not_miss(module, incompatible_keys):
    missing = incompatible_keys.missing_keys
    missing[:] = [k for k in missing if not k.startswith(f"{STATE_NAME}.")]


@contextmanager
def attached(state: TrainingState, model: nn.Module) -> Iterator[None]:
    """Make `state` a submodule of `model` while open, out of reach of `state_dict` and `load_state_dict`."""
    first = next((p for p in model.parameters()), None)
    if first is not None:
        state.to(first.device)
    handles = [
        model.register_state_dict_post_hook(_strip),
        model.register_load_state_dict_post_hook(_do_not_miss),
    ]
    setattr(model, STATE_NAME, state)
    try:
        yield
    finally:
        delattr(model, STATE_NAME)
        for handle in handles:
            handle.remove()


class TrainingStateMixin(StreamMixin, StepCountsMixin):
    """A `Trainer` whose `training_state` trains with the model, is saved in every checkpoint and resumed exactly.

    A checkpoint is marked while it is written, so that one that a kill or a full disk tore is known as such. Resumes
    from the last one that is whole.
    """

    _training_state: TrainingState | None = None
    is_finished = False  # whether the model has become another than the one that was trained, see `finish`

    def __init__(self, *args, **kwargs):
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, nn.Module):
            check_weights(model, type(self).__name__)
        super().__init__(*args, **kwargs)
        check_devices(self.args, type(self).__name__)
        check_loading(getattr(self.accelerator.state, "fsdp_plugin", None), type(self).__name__)

    @property
    def training_state(self) -> TrainingState:
        if self._training_state is None:
            self._training_state = self.make_training_state(self.model)
            self._check_pieces()
            for callback in self.callback_handler.callbacks:
                self._add_entries(callback)
        return self._training_state

    def make_training_state(self, model: PreTrainedModel) -> TrainingState:
        """Build what training `model` needs besides itself. Called again for each new model of `model_init`."""
        return TrainingState()

    def add_callback(self, callback) -> None:
        super().add_callback(callback)
        if self._training_state is not None:
            self._check_pieces()
            self._add_entries(self.callback_handler.callbacks[-1])

    @property
    def _pieces(self) -> list[Piece]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Piece)]

    def _check_pieces(self) -> None:
        """What could not be finished is said when the trainer is made, not after hours."""
        mine = self._pieces
        names = {piece.name for piece in mine}
        check_pieces(self.model, [*(piece for piece in pieces_of(self.model) if piece.name not in names), *mine])

    def _add_entries(self, callback: TrainerCallback) -> None:
        """Own what a callback keeps between steps: `callback.training_state_entries(model)`, name -> value."""
        entries = getattr(callback, "training_state_entries", None)
        for name, value in {} if entries is None else entries(self.model).items():
            if hasattr(self._training_state, name):
                raise ValueError(
                    f"Two callbacks of this trainer keep state under the name {name!r}: a trainer can hold one "
                    f"{type(callback).__name__}."
                )
            self._training_state.add(name, value)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._training_state, self.is_finished = None, False
        return model

    def facts(self) -> dict[str, str]:
        """What all ranks have to have alike, name -> value; DDP makes the weights of the model those of rank 0."""
        model = weights_fact(self.model, values=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        data = {name: data_fact(getattr(self, name)) for name in ("train_dataset", "eval_dataset")}
        return {**settings_facts(self.args), "the model": model, **data}

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, **kwargs):
        asked = resume_from_checkpoint
        if asked is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self.args.world_size > 1:
            check_same({**self.facts(), "the checkpoint to go on from": str(resume_from_checkpoint)}, "A training")
        if asked is True:
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): none is whole. Start "
                    "with resume_from_checkpoint=False, or name a folder."
                )
        elif resume_from_checkpoint and (fault := find_fault(Path(resume_from_checkpoint))) is not None:
            raise ValueError(
                f"Can't find a valid checkpoint at {resume_from_checkpoint}: {fault}. Pass resume_from_checkpoint=True "
                "for the last whole one of output_dir."
            )
        if self.is_finished:  # what was made for the model as it was
            self.model_wrapped, self.optimizer, self.lr_scheduler = self.model, None, None
            self._training_state, self.is_finished = None, False
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)
        if getattr(self.args, "finish_at_end", False):  # plain TrainingArguments, as with a plain Trainer: on request
            self.finish()
        return output

    def finish(self) -> nn.Module:
        """`hfc.finish` of the trained model, which `train` has called already with `finish_at_end`. Returns the model.

        A model that is trained on gets another optimizer.
        """
        if pieces_of(self.model) or forms_of(self.model):
            finish(self.model)
            self.model_wrapped, self.is_finished = self.model, True
        return self.model

    def is_complete(self) -> bool:
        """Whether by now the training has reached what it was asked for: schedules, bits, the last phase.

        Only from then on a checkpoint may be the best, and the patience of an early stopping begins.
        """
        return all(piece.is_done(self.state.global_step) for piece in self._pieces)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        return self.is_complete() and super()._determine_best_metric(metrics, trial)

    def _inner_training_loop(self, *args, **kwargs):
        with (
            attached(self.training_state, self.model),
            dropping(self.model, getattr(self.args, "dropout", None)),
            attention_with_fast_gradients(enabled=self.args.bf16 and self.args.device.type == "cpu"),
        ):
            if self.optimizer is not None:
                add_missing(self.optimizer, self.training_state, may_add=not self.is_deepspeed_enabled)
            return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`, which passes over a loss that is NaN and goes on: here it ends the training, and is named.

        Except in fp16, where an infinite loss is part of the search for a loss scale. A batch without any label has no
        mean over its labels; it counts as a loss of 0, whose gradient it has.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.isnan() and has_no_label(inputs):
            return torch.zeros_like(loss)
        if not self.args.fp16 and not is_finite(loss):
            terms = getattr(self, "_train_terms", {})
            names = [name for name, value in terms.items() if not is_finite(torch.as_tensor(value))]
            place = ""
            if self.args.world_size == 1:  # else the others would wait for the rerun
                place = f": {find_not_finite(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs))}"
            raise FloatingPointError(
                f"The loss is {float(loss)} at step {self.state.global_step + 1}{place}."
                f"{' Losses that are not finite: ' + ', '.join(names) + '.' if names else ''} Look at the data and the "
                "learning rate; the last checkpoint is from before."
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As `Trainer` does it, in a folder that is marked as unfinished until everything is in it and on the disk."""
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()
        state, write = self.state, self.state.save_to_json

        def write_last(path: str) -> None:
            """The state is what `Trainer` writes last; afterwards it removes older checkpoints."""
            self.accelerator.wait_for_everyone()  # each process has written its part
            write(path)
            end_checkpoint(checkpoint)

        state.save_to_json = write_last
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del state.save_to_json
        if not self.args.should_save:
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        tensors = {name: _whole(tensor) for name, tensor in self.training_state.state_dict().items()}
        if tensors and self.args.should_save:
            save_file(tensors, Path(output_dir) / STATE_FILE)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        file = Path(self.state.best_model_checkpoint) / STATE_FILE
        if file.exists():  # masks belong to the weights they were saved with
            _load_whole(self.training_state, load_file(file))

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As in `Trainer`, also before `train()`: what is learned beside the model is among the parameters."""
        with nullcontext() if hasattr(self.model, STATE_NAME) else attached(self.training_state, self.model):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, when the optimizer is there: one that a subclass made gets what it does not know."""
        if not (self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2)):
            add_missing(self.optimizer, self.training_state, may_add=True)
        return super().create_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and len(self.training_state):
            file = Path(checkpoint) / STATE_FILE
            if not file.exists():
                raise ValueError(
                    f"{checkpoint} has no {STATE_FILE}, which this trainer needs to resume: was it written by another "
                    "trainer, or with save_only_model? Start without resume_from_checkpoint."
                )
            _load_whole(self.training_state, load_file(file))
        super()._load_optimizer_and_scheduler(checkpoint)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor as one process would hold it: FSDP's shards gathered, on CPU, its own memory."""
    return whole(tensor).detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def _load_whole(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    own = state.state_dict()
    if (shapes := {n: tuple(t.shape) for n, t in own.items()}) != (
        found := {n: tuple(t.shape) for n, t in tensors.items()}
    ):
        raise ValueError(f"{STATE_FILE} belongs to another setting: expected {shapes}, found {found}.")
    for name, tensor in tensors.items():
        write_(own[name], tensor)
