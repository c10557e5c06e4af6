"""Embeddings and linear maps as a product of two thin matrices, found by a singular value decomposition."""

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hf_compress.layers.sentinel import Sentinel
from hf_compress.model.classes import made_class

FACTORS = ("table", "projection")


class LowRank(Sentinel):
    """weight (N, K) = table (N, R) @ projection (K, R)^T; the table has a row for each token or output."""

    FORM, PARTS = "factorised", "its factors `table` and `projection`"
    table: nn.Parameter
    projection: nn.Parameter

    @property
    def rank(self) -> int:
        return self.table.shape[1]

    def dense_weight(self) -> Tensor:
        return self.table @ self.projection.T


class LowRankEmbedding(LowRank, nn.Embedding):
    """Looks up R numbers for a token, and projects them to the width of the model."""

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.table, self.padding_idx)  # (..., R)
        return F.linear(rows, self.projection)  # (..., D)


class LowRankLinear(LowRank, nn.Linear):
    """y = (x projection) table^T + bias: two thin products instead of a wide one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.projection, self.table, self.bias)


class SharedLowRankLinear(LowRankLinear):
    """A map with a table of its own and the projection of another, `owner`, that reads the same input."""

    owner: tuple[LowRankLinear]  # in a tuple, so that it is no part of this module, nor stored with it

    @property
    def projection(self) -> nn.Parameter:
        return self.owner[0].projection

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or not self.projection.is_meta:
            return super().forward(x)
        with align_module_device(self.owner[0], x.device):  # what accelerate keeps on disk or CPU comes for its own map
            return super().forward(x)


def share_projection(module: LowRankLinear, owner: LowRankLinear) -> None:
    """Changes `module`: its projection is that of `owner` from now on, which stores it for both."""
    del module._parameters["projection"]
    module.__class__, module.owner = SharedLowRankLinear, (owner,)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The table (N, R) and projection (K, R) whose product is nearest to `weight` (N, K) in the Frobenius norm.

    Eckart and Young, 1936, https://doi.org/10.1007/BF02288367. The singular values go to the table's side, so that the
    projection has orthonormal columns. Computed in float64 for float64, else in float32. Raises ValueError for a rank
    that the shape does not have.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must lie between 1 and {min(weight.shape)} for a weight {tuple(weight.shape)}, got {rank}."
        )
    compute = torch.promote_types(weight.dtype, torch.float32)
    U, S, Vt = torch.linalg.svd(weight.detach().to(compute), full_matrices=False)
    table, projection = U[:, :rank] * S[:rank], Vt[:rank].T
    return table.to(weight.dtype).contiguous(), projection.to(weight.dtype).contiguous()


def make_low_rank(module: nn.Embedding | nn.Linear, table: nn.Parameter, projection: nn.Parameter) -> None:
    """Changes `module`: it now holds two factors in the place of its weight, and stays what else it was.

    A subclass of `nn.Embedding` keeps what its own `forward` adds (Gemma's and BART's scale): the low-rank class stands
    between it and `nn.Embedding`, so that its `super().forward` looks up the factors.
    """
    module.__class__ = low_rank_class(type(module))
    del module._parameters["weight"]
    module.table, module.projection = table, projection


def low_rank_class(kind: type) -> type:
    """The low-rank version of a class of embeddings or linear maps. Raises ValueError for other classes."""
    plain = {nn.Embedding: LowRankEmbedding, nn.Linear: LowRankLinear}
    if kind in plain:
        return plain[kind]
    if not issubclass(kind, nn.Embedding) or issubclass(kind, LowRank) or "weight" in vars(kind):
        raise ValueError(f"A {kind.__name__} cannot be made a product of factors; expected an embedding or nn.Linear.")
    return made_class(f"LowRank{kind.__name__}", kind, LowRankEmbedding)
