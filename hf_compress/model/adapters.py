"""Adapters of PEFT inside a model: what changes its weights for good must not take them for weights of the model."""

from torch import nn


def check_no_adapters(model: nn.Module) -> None:
    """Raise ValueError for a model that holds adapters, whether PEFT wraps it or they were put into it."""
    names = list(getattr(model, "peft_config", None) or ())
    if not names and any(hasattr(module, "base_layer") for module in model.modules()):
        names = ["default"]
    if names:
        raise ValueError(
            f"{type(model).__name__} holds the adapters {names}, which would be changed along with the model and no "
            "longer fit it. Merge them first, `model = model.merge_and_unload()`; or compress the model alone and put "
            "the adapters on it afterwards: they train and load on packed layers."
        )
