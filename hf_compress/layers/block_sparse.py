"""A linear layer that stores and multiplies only some blocks of its weight."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.engines import block_sparse, ops
from hf_compress.engines.opaque import opaque_product, register
from hf_compress.layers.packed_module import as_autocast, without_autocast
from hf_compress.layers.sentinel import Sentinel

_INDEX = ("crow", "col", "crow_t", "col_t", "perm_t")  # made from the stored indices, for the kernels


class BlockSparseLinear(Sentinel, nn.Linear):
    """y = x W^T + bias, with W (N, K) in block compressed sparse rows. Takes the place of an `nn.Linear` or a `Conv1D`.

    values        (num_blocks, Bn, Bk)      the stored blocks, a parameter; sides among 16, 32, 64 and 128
    crow_indices  (ceil(N / Bn) + 1,) int32  where each block row starts in `values`
    col_indices   (num_blocks,) int32        block column of each stored block, rising within a block row

    Where a block reaches beyond N or K, what lies outside is stored as zeros. It trains: gradients go to the stored
    blocks, to the bias and to x; blocks that are not stored stay away.
    """

    FORM, PARTS = "block-sparse", "its stored blocks `values`"
    _made = None  # the blocks, their version, and the run made of them

    def __init__(self, in_features: int, out_features: int, block_size: tuple[int, int], num_blocks: int, *,
                 bias: bool = True, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None):  # fmt: skip
        nn.Module.__init__(self)  # not nn.Linear's: here `weight` is a property
        self.in_features, self.out_features = in_features, out_features
        self.values = nn.Parameter(torch.zeros(num_blocks, *block_size, dtype=dtype, device=device))
        rows = -(-out_features // block_size[0])
        self.register_buffer("crow_indices", torch.zeros(rows + 1, dtype=torch.int32, device=device))
        self.register_buffer("col_indices", torch.zeros(num_blocks, dtype=torch.int32, device=device))
        for name in _INDEX:
            self.register_buffer(name, None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_dense(
        cls, module: nn.Linear | Conv1D, block_mask: Tensor, block_size: tuple[int, int]
    ) -> "BlockSparseLinear":
        """The blocks of `module` that `block_mask` (ceil(N / Bn), ceil(K / Bk)) marks, with its very bias.

        Blocks with a side of 4 or 8 are stored as the blocks of 16 that hold them.
        """
        weight = module.weight.detach()
        sparse = ops.bsr_from_dense(weight.T if isinstance(module, Conv1D) else weight, block_mask, block_size)
        num_blocks, *sides = sparse.values.shape
        layer = cls(sparse.in_features, sparse.out_features, tuple(sides), num_blocks, bias=False,
                    dtype=weight.dtype, device=weight.device)  # fmt: skip
        layer.values = nn.Parameter(sparse.values.clone(), requires_grad=module.weight.requires_grad)
        layer.crow_indices, layer.col_indices = sparse.crow.clone(), sparse.col[:num_blocks].clone()
        layer.bias = module.bias
        layer.training = module.training
        layer.build_index()
        return layer

    @property
    def block_size(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def density(self) -> float:
        """Share of the blocks that are stored."""
        (Bn, Bk), num_blocks = self.block_size, len(self.values)
        return num_blocks / (-(-self.out_features // Bn) * -(-self.in_features // Bk))

    def dense_weight(self) -> Tensor:
        return ops.bsr_to_dense(self._sparse(self.values))

    def build_index(self) -> None:
        """Make what the kernels walk from the stored indices. Raises ValueError for indices out of range or order."""
        index = ops.bsr_weight(
            self.values.detach(), self.crow_indices, self.col_indices, self.out_features, self.in_features
        )
        for name in _INDEX:
            setattr(self, name, getattr(index, name))
        self._lies_elsewhere()

    def _lies_elsewhere(self) -> None:
        """Let compiled graphs find this layer by its blocks, wherever these lie now."""
        if len(self.values) and self.values.device.type == "cpu":
            register(self, self.values)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._lies_elsewhere()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._lies_elsewhere()

    def forward(self, x: Tensor) -> Tensor:
        x, values, bias = as_autocast(x), self.values, self.bias
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias))
        if learns or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or not len(rows):
            y = self._plain(rows)
        elif torch.compiler.is_compiling() and len(values):
            y = opaque_product(rows, bias, values, self.out_features)
        else:
            y = self.infer(rows, bias)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def _plain(self, rows: Tensor) -> Tensor:
        """By the operator, which is differentiable: a kernel on a GPU, the dense product elsewhere."""
        dtype, bias = rows.dtype, self.bias
        weight = self._sparse(self.values.to(dtype))
        product = lambda rows, bias: ops.bsr_linear(rows, weight, bias)  # noqa: E731
        return without_autocast(product, rows, None if bias is None else bias.to(dtype))

    def infer(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """rows (M, K) -> (M, N) on the CPU, outside of autograd and compilation.

        What is made of the blocks is kept until they change; a change in place of an inference tensor leaves no trace.
        """
        values = self.values
        if values.is_inference():
            return self._plain(rows)
        if self._made is None or self._made[0] is not values or self._made[1] != values._version:
            with torch.inference_mode(False), torch.no_grad():
                run = block_sparse.make_run(self._sparse(values.detach()), self.density)
            self._made = values, values._version, run
        run = self._made[2]
        return self._plain(rows) if run is None else without_autocast(run, rows, bias)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": None}

    def _sparse(self, values: Tensor) -> "ops.BlockSparseWeight":
        index = (getattr(self, name) for name in _INDEX)
        return ops.BlockSparseWeight(values, *index, self.out_features, self.in_features)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.build_index()

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"block_size={self.block_size}, num_blocks={len(self.values)}"
        )
