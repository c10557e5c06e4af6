"""What one model makes of a batch, ready for the losses: run alike for student and teacher."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from hf_compress.model.capture import AttentionSignals
from hf_compress.model.tasks import plain_model

OF_CHOICES = ("input_ids", "attention_mask", "token_type_ids")
HIDDEN_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


@dataclass
class Run:
    """What one model made of a batch: its outputs and the signals of its inner layers, ready for the losses."""

    outputs: Mapping
    logits: Tensor  # (items, C): those that count, see `Task.logits`; empty where no loss reads them
    hidden_states: dict[int, Tensor]
    attention: dict[int, AttentionSignals]
    learns: bool = True  # False in evaluation, where a term may have asked for the graph all the same


NO_LOGITS = torch.empty(0)


def projection(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """A learned map from the student's width to the teacher's; nothing to learn where they are equal."""
    mine, theirs = plain_model(student).config.hidden_size, plain_model(teacher).config.hidden_size
    return nn.Identity() if mine == theirs else nn.Linear(mine, theirs, bias=False)


def accepted(model: nn.Module, inputs: dict) -> dict:
    """The inputs that `model` knows by name: student and teacher may differ in them (token_type_ids).

    A model whose config says `return_dict=False` is asked for names all the same.
    """
    plain = plain_model(model)
    parameters = inspect.signature(plain.forward).parameters
    found = {name: value for name, value in inputs.items() if name in parameters}
    return found | (
        {"return_dict": True} if getattr(getattr(plain, "config", None), "return_dict", True) is False else {}
    )


def named(outputs: object, model: nn.Module, *, has_labels: bool = False) -> Mapping:
    """`outputs` of `model` by name, read as `Trainer` reads them; TypeError where they are something else.

    A model of one's own may give a tuple, whose first part, a single number, is the loss where there were labels, and
    then come logits; or a dict whose one entry beside the loss is its logits, whatever it is called; or logits alone.
    """
    if isinstance(outputs, (Tensor, tuple, list)):
        parts = [outputs] if isinstance(outputs, Tensor) else outputs
        gives_loss = has_labels and len(parts) > 1 and isinstance(parts[0], Tensor) and parts[0].numel() == 1
        others = (f"output_{number}" for number in count(1))
        outputs = dict(zip(chain(["loss"] * gives_loss, ["logits"], others), parts, strict=False))
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"The forward of {type(plain_model(model)).__name__} returned a {type(outputs).__name__}; expected a "
            "ModelOutput, a dict with `logits` (and `loss` where there are labels), or a tuple of the loss and logits."
        )
    others = [name for name in outputs if name != "loss"]
    if len(others) == 1 and not others[0].endswith("logits"):
        return {"logits" if name == others[0] else name: value for name, value in outputs.items()}
    return outputs


def predictions(outputs: Mapping, loss: Tensor, model: nn.Module, *, all_outputs: bool) -> ModelOutput:
    """What leaves the student's forward: the whole loss, and what `Trainer` collects as predictions.

    In training the logits alone, since nothing else is read; in evaluation all that the model gave of itself.
    """
    config = getattr(plain_model(model), "config", None)
    hidden = () if getattr(config, "output_hidden_states", False) else HIDDEN_STATES  # we asked for them, not the user
    kept = {
        k: v for k, v in outputs.items() if k != "loss" and k not in hidden and (all_outputs or k.endswith("logits"))
    }
    return ModelOutput(loss=loss, **{k: _detached(v) for k, v in kept.items()})


def _detached(value):
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if isinstance(value, (tuple, list)) else value


def flat_choices(inputs: dict) -> dict:
    """Inputs of several choices (B, choices, T) as the rows (B * choices, T) that the layers see."""
    is_flat = getattr(inputs.get("input_ids"), "ndim", 2) == 2
    return inputs if is_flat else {k: v.flatten(0, 1) if k in OF_CHOICES else v for k, v in inputs.items()}
