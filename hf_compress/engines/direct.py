"""The short way to an engine that a layer has used before: a small layer takes less time than finding its engine."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.engines.integers import Stored
from hf_compress.engines.kept import kept_for
from hf_compress.engines.packed import Body, find_engine


class DirectCalls:
    """A layer's engines by number of tokens and dtype, as long as the stored tensors are what they were.

    Only for calls outside autograd, autocast and compilation. Never saved or copied: `PackedLinear` drops it.
    """

    __slots__ = ("engines", "route", "stored", "versions")

    def __init__(self, stored: Stored, route: str):
        self.stored, self.route = stored, route
        self.versions = tuple(None if tensor is None else tensor._version for tensor in stored[:4])
        self.engines: dict[tuple[int, torch.dtype], Body] = {}

    @staticmethod
    def are_possible(stored: Stored) -> bool:
        """A change in place of an inference tensor has no trace."""
        return not any(tensor is not None and tensor.is_inference() for tensor in stored[:4])

    def are_of(self, buffers: Mapping[str, Tensor | None]) -> bool:
        qweight, scales, zeros, g_idx = self.stored[:4]
        return (
            buffers["qweight"] is qweight
            and buffers["scales"] is scales
            and buffers["qzeros"] is zeros
            and buffers["g_idx"] is g_idx
            and self.versions
            == (
                qweight._version,
                scales._version,
                None if zeros is None else zeros._version,
                None if g_idx is None else g_idx._version,
            )
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """y, or None where no engine keeps the weight."""
        shape, stored = x.shape, self.stored
        rows = x if len(shape) == 2 else x.reshape(-1, stored.in_features)
        key = (len(rows), x.dtype)
        engine = self.engines.get(key)
        if engine is None:
            if not len(rows):
                return None
            engine = find_engine(stored, self.route, *key, kept_for(stored[:4]))
            if isinstance(engine, torch.dtype):
                return None
            self.engines[key] = engine
        y = engine(rows, bias)
        return y if len(shape) == 2 else y.reshape(*shape[:-1], stored.out_features)
