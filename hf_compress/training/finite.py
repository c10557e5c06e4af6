"""Where a NaN or an infinity comes from: asked once a loss is not finite, so that the error names the place."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def has_no_label(inputs: Mapping[str, Tensor]) -> bool:
    """Whether a batch has columns for labels, but none is one: -100 everywhere, or all answers beyond the text."""
    labels, tokens = inputs.get("labels"), inputs.get("input_ids")
    if isinstance(labels, Tensor):
        return not labels.is_floating_point() and bool((labels == -100).all())
    positions = [inputs[name] for name in ("start_positions", "end_positions") if name in inputs]
    return tokens is not None and any(bool((at >= tokens.shape[1]).all()) for at in positions)


def find_not_finite(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """The first place, in the order of computation, that holds NaN or infinity: the batch, a weight, or an output.

    Runs `model` on the batch once more, in the mode it is in.
    """
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not is_finite(value):
            return f"{name!r} of the batch holds NaN or infinity"
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not is_finite(value.detach()):
            return f"the weight {name} holds NaN or infinity"
    outputs: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not outputs and not all(is_finite(t) for t in tensors if isinstance(t, Tensor)):
                outputs.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    accepted = inspect.signature(model.forward).parameters
    try:
        with torch.no_grad():
            model(**{name: value for name, value in inputs.items() if name in accepted})
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return f"{outputs[0]} gives NaN or infinity although its weights and the batch hold none"
    return "all weights, inputs and outputs of layers are finite, so the loss itself makes it"
