"""Optimizers that a user brings, or makes before training: they learn what belongs to the training alone as well."""

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

KEPT_WEIGHTS = ("x", "y", "z")  # what schedule-free optimizers call the weights between which they change


def add_missing(optimizer: torch.optim.Optimizer, state: nn.Module, *, may_add: bool) -> None:
    """Changes `optimizer`: parameters of `state` that it does not know join its first group, with its settings.

    A schedule keeps its number of groups. Raises ValueError where nothing can be added (`may_add` is False).
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = {n: p for n, p in state.named_parameters() if p.requires_grad and id(p) not in known}
    if not missing:
        return
    if not may_add:
        raise ValueError(
            f"The optimizer that was given does not know {', '.join(list(missing)[:5])}, which this trainer learns "
            "beside the model, and under DeepSpeed nothing can be added. Pass optimizer_cls_and_kwargs instead."
        )
    logger.warning(
        "The optimizer did not know %d parameters learned beside the model (%s, ...): they join its first group.",
        len(missing), next(iter(missing)),
    )  # fmt: skip
    optimizer.param_groups[0]["params"].extend(missing.values())


def versions(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """A parameter, and what `optimizer` may put in its place, as schedule-free ones do in `eval()`."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    kept = (state.get(name) for name in KEPT_WEIGHTS)
    return [parameter.detach(), *(t for t in kept if isinstance(t, Tensor) and t.shape == parameter.shape)]
