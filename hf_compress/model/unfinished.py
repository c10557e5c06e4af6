"""What training left open in a model, told by two attributes, so that all who would lose it can ask."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.model.tasks import plain_model

PIECES = "hfc_pieces"  # the attribute of a model that lists its pieces, see `training.pieces`
FORM = "hfc_form"  # the attribute of a module that holds its form
REMINDER = "hfc_reminder"  # the attribute of a model that holds the handle of its reminder

logger = logging.getLogger(__name__)


def pieces_of(model: nn.Module) -> list[Any]:
    return list(getattr(model, PIECES, ()))


def forms_of(model: nn.Module) -> dict[nn.Module, Any]:
    """The modules of `model` that have a form."""
    return {module: vars(module)[FORM] for module in model.modules() if FORM in vars(module)}


def check_model(model: object, what: str) -> None:
    """Raise TypeError for what is no model of Transformers, alone or under adapters."""
    if not isinstance(plain_model(model), PreTrainedModel):
        hint = "Pass the one inside it." if isinstance(model, nn.Module) else "Load it with from_pretrained first."
        raise TypeError(f"{what} takes a model of Transformers, got {type(model).__name__}. {hint}")


def check_loaded(model: object, what: str) -> None:
    """`check_model`; and raise ValueError where weights are nowhere, neither in memory nor offloaded by accelerate."""
    check_model(model, what)
    check_weights(model, what)


def check_weights(model: nn.Module, what: str) -> None:
    """Raise ValueError where weights of any module are nowhere, neither in memory nor offloaded by accelerate."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{what} reads weights, and {missing[0]} is not loaded: it is on the meta device. Load the model with "
            "from_pretrained."
        )


def check_finished(model: nn.Module, what: str) -> None:
    """`check_model`; and raise ValueError if training has left something open in `model`, which `what` would lose."""
    check_model(model, what)
    names = [type(piece).__name__ for piece in pieces_of(model)]
    names += [type(form).__name__ for form in list(forms_of(model).values())[:1]]
    if names:
        raise ValueError(
            f"This model has been trained with {', '.join(names)}, and {what} would lose that: call "
            "hf_compress.finish(model) first."
        )


def remind(model: nn.Module) -> None:
    """Changes `model`, whose training is over: to save it before `finish` is no error, but is told, once.

    Zeros are in the weights and are saved with them. How weights are rounded and which layers go is in no file.
    """
    forget_reminder(model)
    vars(model)[REMINDER] = model.register_state_dict_pre_hook(_tell)


def forget_reminder(model: nn.Module) -> None:
    if (handle := vars(model).pop(REMINDER, None)) is not None:
        handle.remove()


def _tell(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    forget_reminder(model)
    names = [type(piece).__name__ for piece in pieces_of(model) if piece.removed_layers(model)]
    names += [type(form).__name__ for form in list(forms_of(model).values())[:1]]
    if names:
        logger.warning(
            "The weights alone are saved now: this model has been trained with %s, and what opens the file will answer "
            "otherwise. Call hf_compress.finish(model) before you save it.", ", ".join(names),
        )  # fmt: skip
