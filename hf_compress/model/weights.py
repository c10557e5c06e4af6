"""The weights that a model computes with, however they are stored; and which of them can be written to."""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.model.anatomy import Anatomy, is_projection
from hf_compress.model.record import QUANT_METHOD


def as_matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of `module`: a weight as (N, K), also where `Conv1D` holds it the other way round."""
    return tensor.T if isinstance(module, Conv1D) and tensor.dim() == 2 else tensor


def float_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` by its names; weights of linear maps as (N, K), packed ones dequantized.

    A packed, block-sparse or factorised module has under `.weight` the dense weight that its stored tensors stand for.
    """
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        if isinstance(getattr(type(module), "weight", None), property):
            own = {"weight": module.weight, "bias": own.get("bias")}
        for name, tensor in own.items():
            if tensor is not None:
                found[f"{prefix}.{name}".lstrip(".")] = as_matrix(module, tensor.detach())
    return found


def without_foreign_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or a dequantized copy if another library than this one has packed its weights (bitsandbytes).

    Raises ValueError if that library cannot bring them back.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if quantizer is None or method == QUANT_METHOD:
        return model
    try:
        return copy.deepcopy(model).dequantize()
    except NotImplementedError as error:
        raise ValueError(
            f"The weights of this {type(model).__name__} are packed by {getattr(method, 'value', method)}, which "
            "cannot dequantize them. Load the model without quantization."
        ) from error


def check_writable(parts: Anatomy, what: str) -> None:
    """Raise ValueError, naming the modules, where a weight of the layers is no parameter: a change would be lost."""
    fixed = [
        f"{layer.name}.{name}"
        for layer in parts.layers
        for name, module in layer.module.named_modules()
        if is_projection(module) and not _is_writable(module)
    ]
    if fixed:
        raise ValueError(
            f"{what} writes into weights, but {', '.join(fixed[:8])}{' and others' * (len(fixed) > 8)} hold packed, "
            "block-sparse or factorised ones, which are read-only. Do it before these are made; packed ones come back "
            "by model.dequantize()."
        )


def _is_writable(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and weight.is_floating_point()


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
