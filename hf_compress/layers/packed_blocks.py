"""A packed linear layer of which only the blocks that are not empty are stored: few bits of few weights.

In memory it is an ordinary packed layer, empty blocks included, and runs like one; what it saves are the blocks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engines.ops import pack_gptq, pack_rows, unpack_rows, words_per_row
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme

STORED = ("qblocks", "crow_indices", "col_indices")  # in a file, in the place of `qweight`


class PackedBlocksLinear(PackedLinear):
    """y = x W^T + bias with a packed W (N, K) whose empty blocks of `block_size` x `block_size` are not saved.

    In state dicts, in the place of `qweight`:

    qblocks       (words,)                 int32, the integers of the stored blocks one after the other
    crow_indices  (ceil(N / side) + 1,)    int32, where each block row starts among them
    col_indices   (num_blocks,)            int32, block column of each, rising within a block row

    Where a block reaches beyond N or K, what lies outside is stored as zeros. Empty is what stands for zero: integers
    equal to their zero point.
    """

    block_size: int

    @classmethod
    def of(cls, layer: PackedLinear, block_size: int) -> "PackedBlocksLinear | None":
        """`layer` with its very tensors, saved in blocks; None where it would not take fewer bytes so."""
        q, zero_points, groups = layer.integers()
        blocks = stored_blocks(q != zero_points[groups].t(), block_size)
        words = words_per_row(int(blocks.sum()) * block_size**2, layer.scheme.bits)
        if words + blocks.shape[0] + 1 + int(blocks.sum()) >= layer.words().numel():
            return None
        layer.hold_words()
        made = cls._empty(layer, layer.scheme, block_size)
        for name in ("qweight", "scales", "qzeros", "g_idx"):
            setattr(made, name, getattr(layer, name))
        made.bias = layer.bias
        made.prepare()
        return made.train(layer.training)

    @classmethod
    def loading(cls, layer: PackedLinear, block_size: int, num_blocks: int) -> "PackedBlocksLinear":
        """An empty layer in the place of the empty `layer`, which waits for the tensors of a file."""
        made = cls._empty(layer, layer.scheme, block_size, device=layer.scales.device)
        made.bias, made.qweight, made.is_loading = layer.bias, None, True
        words = words_per_row(num_blocks * block_size**2, layer.scheme.bits)
        sizes = dict(zip(STORED, (words, -(-layer.out_features // block_size) + 1, num_blocks), strict=True))
        for name, size in sizes.items():
            made.register_buffer(name, torch.zeros(size, dtype=torch.int32, device=layer.scales.device))
        return made

    @classmethod
    def _empty(cls, layer: PackedLinear, scheme: WeightScheme, block_size: int, device: Any = "meta"):
        made = cls(layer.in_features, layer.out_features, scheme, bias=False, dtype=layer.compute_dtype, device=device,
                   is_conv1d=layer.is_conv1d)  # fmt: skip
        made.block_size = block_size
        return made

    @property
    def num_blocks(self) -> int:
        q, zero_points, groups = self.integers()
        return int(stored_blocks(q != zero_points[groups].t(), self.block_size).sum())

    @property
    def _waits(self) -> bool:
        """Whether the blocks of a file are still to become its weight."""
        return STORED[0] in self._buffers

    def prepare(self, **options) -> None:
        if not self._waits:
            super().prepare(**options)

    def check(self, name: str) -> None:
        """As of a packed layer; then the blocks that were loaded become its weight."""
        super().check(name)
        if self._waits:
            try:
                self._take(*(getattr(self, part) for part in STORED))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            for part in STORED:
                delattr(self, part)

    def _take(self, qblocks: Tensor, crow: Tensor, col: Tensor) -> None:
        """Make `qweight` of stored blocks. Raises ValueError for indices out of range or order."""
        N, K, side, bits = self.out_features, self.in_features, self.block_size, self.scheme.bits
        height, width = -(-N // side), -(-K // side)
        crow, col = crow.long(), col.long()
        counts = crow.diff()
        if int(crow[0]) != 0 or int(crow[-1]) != len(col) or (counts < 0).any():
            raise ValueError(f"crow_indices must rise from 0 to the {len(col)} blocks: the file is damaged.")
        row = torch.arange(height, device=crow.device).repeat_interleave(counts)
        place = row * width + col
        if len(col) and (int(col.min()) < 0 or int(col.max()) >= width or (place.diff() <= 0).any()):
            raise ValueError(f"col_indices must rise within each block row and lie in [0, {width - 1}].")
        self.qweight = pack_gptq(torch.zeros(N, K, dtype=torch.uint8, device=qblocks.device), bits)
        _, zero_points, groups = self.integers()
        blocks = _cut(zero_points[groups].t().to(torch.uint8), side)  # (R, C, side, side), all empty
        blocks.flatten(0, 1)[place] = unpack_rows(qblocks, bits, len(col) * side**2).view(-1, side, side)
        self.qweight = pack_gptq(blocks.transpose(1, 2).reshape(height * side, width * side)[:N, :K], bits)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._waits:
            del destination[f"{prefix}qweight"]
            for name, tensor in zip(STORED, self._blocks(), strict=True):
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        blocks = None
        if f"{prefix}qblocks" in state_dict and not self._waits:
            self.hold_words()
            blocks = [state_dict.pop(prefix + name).to(self.scales.device) for name in STORED]
            state_dict[f"{prefix}qweight"] = self.qweight
        super()._load_from_state_dict(state_dict, prefix, *args)
        if blocks is not None:  # the zero points are there by now
            self._take(*blocks)
            self.prepare()

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is saved in the place of `qweight`."""
        q, zero_points, groups = self.integers()
        mask = stored_blocks(q != zero_points[groups].t(), self.block_size)
        crow = F.pad(mask.sum(dim=1).cumsum(0), (1, 0))
        blocks = _cut(q, self.block_size)[mask]  # (num_blocks, side, side)
        return pack_rows(blocks.flatten(), self.scheme.bits), crow.int(), mask.nonzero()[:, 1].int()


def stored_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(ceil(N / side), ceil(K / side)) True where a block of `weight` (N, K) is not all zero."""
    return _cut(weight != 0, block_size).any(dim=(2, 3))


def _cut(matrix: Tensor, side: int) -> Tensor:
    """(N, K) as (ceil(N / side), ceil(K / side), side, side), with zeros beyond N and K; a copy."""
    N, K = matrix.shape
    padded = F.pad(matrix, (0, -K % side, 0, -N % side))
    return padded.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).contiguous()


def packed_blocks(model: nn.Module) -> dict[str, PackedBlocksLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedBlocksLinear)}
