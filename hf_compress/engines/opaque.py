"""Products that a compiled graph cannot hold, as one operator: the layer is found by the tensor that it stores."""

import weakref

import torch
from torch import Tensor, nn

_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # by where their tensor lies


def register(layer: nn.Module, stored: Tensor) -> None:
    """Let compiled graphs find `layer`, which has `infer`, by a tensor of its own; again when that was replaced."""
    _layers[stored.data_ptr()] = layer


def opaque_product(rows: Tensor, bias: Tensor | None, stored: Tensor, out_features: int) -> Tensor:
    """`layer.infer(rows, bias)` of the layer that registered `stored`: (M, K) -> (M, out_features)."""
    return torch.ops.hf_compress.product(rows, bias, stored, out_features)


def _product(rows: Tensor, bias: Tensor | None, stored: Tensor, out_features: int) -> Tensor:
    layer = _layers.get(stored.data_ptr())
    if layer is None:
        raise RuntimeError(
            "A compiled graph holds the product of a layer whose stored weight was put elsewhere by hand "
            "(`.data = ...`): load it with load_state_dict or move it with .to(), which the layer notices."
        )
    return layer.infer(rows, bias)


torch.library.define("hf_compress::product", "(Tensor rows, Tensor? bias, Tensor stored, int out_features) -> Tensor")
torch.library.impl("hf_compress::product", "cpu", _product)
torch.library.register_fake(
    "hf_compress::product", lambda rows, bias, stored, out_features: rows.new_empty(rows.shape[0], out_features)
)
