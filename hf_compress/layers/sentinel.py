"""A module whose weight is stored under other names says so in every state dict, so that it cannot be misread."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.layers.read_only import read_only


def awaited(module: nn.Module) -> Tensor:
    """What stands for the weight of a module whose tensors have not come yet: a shape, which nothing initialises.

    What they hold is believed after it was checked, and some families initialise a layer from the module around it.
    """
    is_linear = isinstance(module, nn.Linear)
    shape = (module.out_features, module.in_features) if is_linear else (module.num_embeddings, module.embedding_dim)
    empty = torch.empty(shape, device="meta")
    empty._is_hf_initialized = True  # Transformers initialises what no file holds, and asks for it by this name
    return empty


class Sentinel:
    """Mixin for linear maps and embeddings without a tensor called `weight`.

    Saved beside the real tensors is one value under that name. Transformers alone would look for a matrix there, find
    the wrong shape and stop; without it, it would find nothing and go on with random weights.
    """

    is_loading = False  # True from the time the empty module is made until its tensors are there: then none is expected
    FORM, PARTS = "", ""  # how the weight is stored, and the parameters that train in its place, for those that write

    @property
    def weight(self) -> Tensor:
        """The weight that the stored tensors stand for: a copy, which cannot be written to."""
        why = (
            f"A {self.FORM} weight is read-only, but for {self.PARTS}, which train in its place: change or merge "
            f"weights, or resize tables, before the model is {self.FORM}; adapters on top of it can be kept apart."
        )
        return awaited(self) if self.is_loading else read_only(self.dense_weight(), why)

    def dense_weight(self) -> Tensor:
        """The weight (N, K), computed from the stored tensors."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_loading:
            destination[f"{prefix}weight"] = torch.zeros(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
