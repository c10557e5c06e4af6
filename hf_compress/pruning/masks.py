"""Masks over matrices cut into blocks. Weights, blocks, heads and neurons are all blocks of some shape:

a weight (1, 1), a block (n, n), a head (D, Dh) and a neuron (D, 1), the last two of the output projection: with its
columns at zero a head or a neuron adds nothing, whatever it computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.model.anatomy import Anatomy, anatomy, in_features, is_projection, matrix, module_names, out_features
from hf_compress.model.attention import Projection
from hf_compress.model.record import read_part
from hf_compress.model.weights import as_matrix, check_writable
from hf_compress.training.optimizers import versions
from hf_compress.training.shards import is_sharded, over_ranks, own, part


class Source(NamedTuple):
    """Rows of a linear map that make the inputs of another: block after block, `size` of `rows` each."""

    module: Projection
    rows: Sequence[int]
    size: int


@dataclass(frozen=True)
class Blocks:
    """The weight (N, K) of one linear map, cut into blocks (r, c).

    Under FSDP2 each rank has a part of it, and of what is told of single weights. What is told of larger blocks is
    the same on all ranks, which ask for it together.
    """

    name: str
    module: Projection
    shape: tuple[int, int]  # (r, c)
    sources: tuple[Source, ...] = ()  # where the inputs of the columns are made, for blocks of whole columns

    @property
    def grid(self) -> tuple[int, int]:
        """(N / r, K / c), the shape of a mask."""
        return out_features(self.module) // self.shape[0], in_features(self.module) // self.shape[1]

    @property
    def weight(self) -> Tensor:
        """(N, K), a view."""
        return matrix(self.module).detach()

    @property
    def gradient(self) -> Tensor | None:
        gradient = self.module.weight.grad
        return gradient.T if isinstance(self.module, Conv1D) and gradient is not None else gradient

    def cut(self, matrix: Tensor) -> Tensor:
        """(N, K) -> (N / r, r, K / c, c), a view."""
        return matrix.unflatten(0, (-1, self.shape[0])).unflatten(2, (-1, self.shape[1]))

    def largest(self, matrix: Tensor) -> Tensor:
        """The largest element of each block, (N / r, K / c)."""
        return self._reduced(matrix, "amax")

    def sum(self, matrix: Tensor) -> Tensor:
        return self._reduced(matrix, "sum")

    def _reduced(self, matrix: Tensor, how: str) -> Tensor:
        """By a sum, or by the largest of what is not negative."""
        if self.shape == (1, 1):
            return matrix
        if not is_sharded(matrix):
            return getattr(self.cut(matrix), how)(dim=(1, 3))
        rows, columns = self._places(matrix)
        mine, (N, K) = own(matrix), self.grid
        across = mine.new_zeros(len(mine), K).scatter_reduce(1, columns.expand_as(mine), mine, how)
        blocks = mine.new_zeros(N, K).scatter_reduce(0, rows[:, None].expand_as(across), across, how)
        return over_ranks(blocks, matrix, how)

    def _places(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The block that each row is in which this rank has, and each column."""
        sizes = zip(matrix.shape, self.shape, strict=True)
        return tuple(
            (torch.arange(size, device=own(matrix).device) // unit)[part(matrix, dim)]
            for dim, (size, unit) in enumerate(sizes)
        )

    @torch.no_grad()
    def scale_(self, factors: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Multiply each block of the weight by its factor, in place; a mask works as well.

        So are other versions of the weight that `optimizer` keeps and may put in its place.
        """
        for version in versions(self.module.weight, optimizer):
            weight = as_matrix(self.module, version)
            if self.shape == (1, 1):  # the product with bytes is twice as fast as that with booleans
                mine = own(factors)
                own(weight).mul_(mine.view(torch.uint8) if mine.dtype == torch.bool else mine)
            elif is_sharded(weight):
                rows, columns = self._places(weight)
                own(weight).mul_(factors[rows][:, columns])
            else:
                self.cut(weight).mul_(factors[:, None, :, None])

    @torch.no_grad()
    def silence_(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set the masked columns (1, K / c) to zero, and what makes their inputs: nobody hears of them any more.

        An input whose column is zero would still widen the range that a quantizer sees.
        """
        self.scale_(mask, optimizer)
        for module, rows, size in self.sources:
            keep = mask[0].repeat_interleave(size)
            silent = torch.zeros(out_features(module), dtype=torch.bool, device=keep.device)
            silent[torch.as_tensor(rows, device=keep.device)[keep == 0]] = True
            biases = [] if module.bias is None else versions(module.bias, optimizer)
            for version in (*versions(module.weight, optimizer), *biases):
                made = as_matrix(module, version)  # (N, K) or (N,)
                own(made)[silent[part(made, 0)]] = 0

    def is_alive(self) -> Tensor:
        """True for blocks that are not all zeros."""
        return self.largest(self.weight.abs()) > 0


def check_prunable(model: nn.Module, what: str) -> None:
    """Raise ValueError for a model whose weights `what` could not change, or that could not be cut afterwards."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{what} changes a Transformers model and its config, but got {type(model).__name__}. Pass the model "
            "inside it; merge adapters first (model.merge_and_unload()), or train them on the pruned model."
        )
    if adapted := [name for name, module in model.named_modules() if hasattr(module, "base_layer")]:
        raise ValueError(
            f"{what} changes weights that adapters add to, such as {adapted[0]}: the zeros would not stay. Merge the "
            "adapters first, or train them on the pruned model."
        )
    if any(read_part(model.config, part) for part in ("bits", "sparsity")):
        raise ValueError(
            f"{what} cuts weights, and this model is quantized or block-sparse. Prune it first, or call "
            "model.dequantize() before."
        )
    check_writable(anatomy(model), what)


def layer_projections(model: nn.Module, parts: Anatomy, block_size: int = 1) -> list[Blocks]:
    """All linear maps within the layers of `model`, cut into square blocks.

    Embeddings and the task's head are left alone. Raises ValueError for shapes that the block size does not divide.
    """
    names = module_names(model)
    maps = dict.fromkeys(m for layer in parts.layers for m in layer.module.modules() if is_projection(m))
    found = [Blocks(names[module], module, (block_size, block_size)) for module in maps]
    for blocks in found:
        shape = out_features(blocks.module), in_features(blocks.module)
        if shape[0] % block_size or shape[1] % block_size:
            raise ValueError(
                f"block_size={block_size} does not divide {blocks.name}, of shape {shape}. Choose a divisor of all "
                "shapes, such as 16 or 32 for most models."
            )
    return found
