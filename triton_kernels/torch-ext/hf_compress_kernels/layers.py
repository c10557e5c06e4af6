"""Layers for `kernels.kernelize`: a forward pass over the state of the module they stand in for, and nothing else."""

import torch
from torch import Tensor, nn

from .blocks import BlockSparseWeight
from .bsr import bsr_linear
from .planes import PackedWeight
from .wna16 import wna16_linear


class WNA16Linear(nn.Module):
    """For modules whose `packed` is the `PackedWeight` of their run-time layout. Gradients reach the input and bias."""

    has_backward = True
    can_torch_compile = True
    packed: PackedWeight
    bias: torch.Tensor

    def forward(self, x: Tensor) -> Tensor:
        return wna16_linear(x, self.packed, self.bias)


class BSRLinear(nn.Module):
    """For modules whose `sparse` is the `BlockSparseWeight` of their values and indices."""

    has_backward = True
    can_torch_compile = True
    sparse: BlockSparseWeight
    bias: torch.Tensor

    def forward(self, x: Tensor) -> Tensor:
        return bsr_linear(x, self.sparse, self.bias)
