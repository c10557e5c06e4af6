"""x W^T for a block-sparse W on the CPU: MKL's product of the stored blocks, or the dense product.

    y^T (N, M) = W (N, K) x^T (K, M)

The blocks stand on the left, where MKL reads each once for all tokens; as x W^T it is several times slower.
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engines import processor
from hf_compress.engines.ops import BlockSparseWeight, bsr_to_dense
from hf_compress.engines.routes import SMALLEST, BFloat16, Float32, Run
from hf_compress.model.precision import is_amd

FEW, WHOLE, MANY = 4, 16, 128  # between them MKL on Intel takes whole sixteens of tokens in a third of the time
DENSEST = 0.12  # share of stored blocks up to which their product beats the dense one from 32 tokens on


def make_run(weight: BlockSparseWeight, density: float) -> Run | None:
    """The product of inference with the blocks as they are now; None for the plain path.

    In bfloat16 where that is fast the dense product wins at every density, else few blocks are multiplied in float32.
    """
    if processor.mode() == "reference" or weight.out_features * weight.in_features < SMALLEST:
        return None
    if weight.values.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.values.dtype is torch.bfloat16 and processor.mode() == "auto" and processor.has_bfloat16():
        return BFloat16(_Dense(weight))
    _, Bn, Bk = weight.values.shape
    if Bn == Bk and density <= DENSEST and len(weight.values) and torch.backends.mkl.is_available():
        return StoredBlocks(weight)
    return Float32(_Dense(weight))


class _Dense(NamedTuple):
    """A block-sparse weight, as the dense routes read theirs."""

    blocks: BlockSparseWeight

    def weight(self) -> "_Dense":
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return bsr_to_dense(self.blocks).to(dtype)


class StoredBlocks:
    """Square blocks in MKL's hands; a float32 weight is not copied. Error: float32 rounding."""

    name = "stored blocks"

    def __init__(self, weight: BlockSparseWeight):
        values, self.out_features = weight.values.detach().float(), weight.out_features
        side, rows = values.shape[1], len(weight.crow) - 1
        columns = -(-weight.in_features // side)
        self.padding = columns * side - weight.in_features
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "in beta state"
            self.blocks = torch.sparse_bsr_tensor(
                weight.crow, weight.col[: len(values)], values, (rows * side, columns * side)
            )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (M, K) -> (M, N)."""
        M = x.shape[0]
        more = -M % WHOLE if FEW < M < MANY and not is_amd() else 0
        rows = F.pad(x.float(), (0, self.padding, 0, more)) if self.padding or more else x.float()
        y = (self.blocks @ rows.t())[: self.out_features, :M].t().contiguous()  # (M, N)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
