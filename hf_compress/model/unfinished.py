"""What training left open in a model, told by two attributes, so that all who would lose it can ask."""

from typing import Any

from torch import nn

PIECES = "hfc_pieces"  # the attribute of a model that lists its pieces, see `training.pieces`
FORM = "hfc_form"  # the attribute of a module that holds its form


def pieces_of(model: nn.Module) -> list[Any]:
    return list(getattr(model, PIECES, ()))


def forms_of(model: nn.Module) -> dict[nn.Module, Any]:
    """The modules of `model` that have a form."""
    return {module: vars(module)[FORM] for module in model.modules() if FORM in vars(module)}


def check_finished(model: nn.Module, what: str) -> None:
    """Raise ValueError if training has left something open in `model`, which `what` would lose."""
    names = [type(piece).__name__ for piece in pieces_of(model)]
    names += [type(form).__name__ for form in list(forms_of(model).values())[:1]]
    if names:
        raise ValueError(
            f"This model has been trained with {', '.join(names)}, and {what} would lose that: call "
            "hf_compress.finish(model) first."
        )
