"""Quantize and dequantize at once while training, with gradients that pass straight through the rounding."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.layers.activations import round_per_token, round_to_range
from hf_compress.layers.scheme import (
    LARGEST_INPUT,
    SCALE_DTYPES,
    SMALLEST_RANGE,
    WeightScheme,
    check_activation_range,
)
from hf_compress.measuring.measure import evaluating
from hf_compress.model.anatomy import matrix
from hf_compress.model.calibration import input_hooks, run_model
from hf_compress.quantization.grids import (
    QuantizedWeight,
    dequantize_from_grid,
    find_grid,
    fits_float16,
    quantize_to_grid,
    smallest_scale,
)
from hf_compress.quantization.modules import packed
from hf_compress.training.callback import is_recomputing
from hf_compress.training.progress import progress_bar
from hf_compress.training.shards import whole, write_

ONLY_ZEROS = SMALLEST_RANGE / 4  # the upper end of a range that has seen nothing else
RANGE_MOMENTUM = 0.95  # running activation ranges keep this share of what they were


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantized value, exactly. Backward: the gradient, where the value lies inside the grid's range."""

    @staticmethod
    def forward(ctx, values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        rounded = (values / scale).add_(zero_point).round_()
        q = rounded.clamp(0, 2**bits - 1)
        ctx.save_for_backward(q == rounded)  # inside the range
        return q.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class _LearnedStep(torch.autograd.Function):
    """Learned step size quantization (Esser et al., 2020, https://arxiv.org/abs/1902.08153, eq. 3).

    d out / d scale = (q - zero_point) - values / scale inside the range, q - zero_point where clipped; the sum is
    scaled by 1 / sqrt(n * qmax) for the n values that share a scale.
    """

    @staticmethod
    def forward(ctx, values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        position = values / scale + zero_point
        inside = (position >= -0.5) & (position <= 2**bits - 0.5)
        q = position.round().clamp(0, 2**bits - 1)
        ctx.save_for_backward(torch.where(inside, q - position, q - zero_point), inside)
        ctx.scale_shape, ctx.largest = scale.shape, 2**bits - 1
        return dequantize_from_grid(q, scale, zero_point)

    @staticmethod
    def backward(ctx, grad: Tensor):
        slope, inside = ctx.saved_tensors
        shared = grad.shape[-1]
        grad_scale = (grad * slope).sum(-1, keepdim=True) / math.sqrt(shared * ctx.largest)
        return grad * inside, grad_scale.sum_to_size(ctx.scale_shape), None, None


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, learned: bool = False) -> Tensor:
    """`values` (..., g) on the grid scale * (q - zero_point) of each row, both (..., 1).

    The gradient of `values` is passed through unchanged inside the range and is zero outside. With `learned` the scale
    has a gradient too.
    """
    return (_LearnedStep if learned else _StraightThrough).apply(values, scale, zero_point, bits)


class WeightQuantizer(nn.Module):
    """Keeps the grid of one weight (N, K), one scale and zero point for each block of `rows` x `columns` weights.

    Q-BERT bundles output rows (columns = K); GPTQ's groups are runs of columns (rows = 1). The grid is chosen anew by
    `refresh`, or learned. Scales are rounded where they are used, since they are stored so: to float16, or to float32
    once that could not hold them. While it trains a random share `rounded_share` of the weights is rounded in each
    pass, and the others are as they are.
    """

    GRID = ("scale", "zero_point")  # the tensors (N / rows, K / columns, ...) that say which values there are
    NUM_SCALES = 1

    def __init__(self, weight: Tensor, bits: int, *, rows: int = 1, columns: int = -1, symmetric: bool = False,
                 range_method: str = "mse", learned: bool = False, rounded_share: float = 1.0):  # fmt: skip
        super().__init__()
        N, K = weight.shape
        columns = K if columns == -1 else columns
        if N % rows or K % columns:
            raise ValueError(f"Blocks of {rows} x {columns} do not divide a weight of {N} x {K}.")
        self.bits, self.rows, self.columns, self.shape = bits, rows, columns, (N, K)
        self.symmetric, self.range_method, self.learned = symmetric, range_method, learned
        self.scale_dtype, self.rounded_share = "float16", rounded_share
        scale = torch.ones(N // rows, K // columns, self.NUM_SCALES, device=weight.device)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer(self.GRID[1], torch.zeros_like(scale[..., :1]))
        self.refresh(weight)

    def blocks(self, weight: Tensor) -> Tensor:
        """(N, K) as (N / rows, K / columns, rows * columns)."""
        N, K = self.shape
        blocks = weight.reshape(N // self.rows, self.rows, K // self.columns, self.columns).transpose(1, 2)
        return blocks.flatten(-2)

    def unblocks(self, blocks: Tensor) -> Tensor:
        N, K = self.shape
        return blocks.unflatten(-1, (self.rows, self.columns)).transpose(1, 2).reshape(N, K)

    @torch.no_grad()
    def select(self, rows: Sequence[int] | None, columns: Sequence[int] | None) -> "WeightQuantizer":
        """The quantizer of these rows and columns of the weight: nothing is chosen anew, each keeps its grid.

        Rows of a bundle get a scale each, the bundle's. Raises ValueError for a part of a group of columns.
        """
        cut = copy.deepcopy(self)
        grid = [whole(getattr(self, name).detach()) for name in self.GRID]  # (N / rows, G, ...)
        if rows is not None:
            grid = [tensor.repeat_interleave(self.rows, 0)[list(rows)] for tensor in grid]
            cut.rows, cut.shape = 1, (len(rows), cut.shape[1])
        if columns is not None and self.columns == self.shape[1]:
            cut.columns, cut.shape = len(columns), (cut.shape[0], len(columns))
        elif columns is not None:
            groups = list(dict.fromkeys(column // self.columns for column in columns))
            complete = [group * self.columns + i for group in groups for i in range(self.columns)]
            if list(columns) != complete:
                raise ValueError(f"Groups of {self.columns} columns cannot be cut in the middle.")
            grid, cut.shape = [tensor[:, groups] for tensor in grid], (cut.shape[0], len(columns))
        scale, other = (tensor.clone() for tensor in grid)
        cut.scale = nn.Parameter(scale) if self.learned else scale
        setattr(cut, self.GRID[1], other)
        return cut

    @torch.no_grad()
    def refresh(self, weight: Tensor, bits: int | None = None) -> None:
        """Choose the grid for the weight as it is now, at another width if `bits` says so."""
        self.bits = self.bits if bits is None else bits
        blocks = self.blocks(weight.float())
        if not fits_float16(blocks, self.bits, symmetric=self.symmetric):
            self.scale_dtype = "float32"
        scale, zero_point = find_grid(blocks, self.bits, symmetric=self.symmetric, range_method=self.range_method,
                                      scale_dtype=SCALE_DTYPES[self.scale_dtype])  # fmt: skip
        write_(self.scale, scale)
        self.zero_point.copy_(zero_point)

    def stored_scale(self) -> Tensor:
        """The scale as it will be stored; its gradient is that of the scale."""
        dtype, scale = SCALE_DTYPES[self.scale_dtype], whole(self.scale)
        rounded = scale.detach().clamp(min=smallest_scale(dtype)).to(dtype).float()
        return scale + (rounded - scale).detach() if self.learned and self.training else rounded

    def forward(self, weight: Tensor) -> Tensor:
        blocks = self.blocks(weight.float())
        values = fake_quantize(blocks, self.stored_scale(), self.zero_point, self.bits, learned=self.learned)
        return self.unblocks(self._some_of(values, blocks)).to(weight.dtype)

    def _some_of(self, rounded: Tensor, exact: Tensor) -> Tensor:
        """Quant-Noise (Fan et al., 2021, https://arxiv.org/abs/2004.07320): those of a random share are rounded."""
        if not self.training or self.rounded_share == 1:
            return rounded
        return torch.where(torch.rand_like(exact) < self.rounded_share, rounded, exact)

    def look_up(self, input: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """`forward(weight)[input]` for a grid of one scale a row, without a pass over the rows that nobody asks for."""
        rows = F.embedding(input, weight, padding_idx).float()
        scale, zero_point = self.stored_scale()[:, 0][input], self.zero_point[:, 0][input]  # (..., 1)
        values = fake_quantize(rows, scale, zero_point, self.bits, learned=self.learned)
        return self._some_of(values, rows).to(weight.dtype)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """The integers and the grid that `forward` uses, as packed layers take them."""
        N, K = self.shape
        self.eval()
        scale, zero_point = self.stored_scale(), self.zero_point
        q = self.unblocks(quantize_to_grid(self.blocks(weight.float()), scale, zero_point, self.bits))
        per_row = [t[..., 0].repeat_interleave(self.rows, 0).t().contiguous() for t in (scale, zero_point)]  # (G, N)
        g_idx = torch.arange(K, dtype=torch.int32, device=weight.device) // self.columns
        return QuantizedWeight(q.to(torch.uint8), per_row[0], per_row[1].to(torch.uint8), g_idx)

    def scheme(self, **options) -> WeightScheme:
        group_size = -1 if self.columns == self.shape[1] else self.columns
        return WeightScheme(self.bits, group_size, self.symmetric, scale_dtype=self.scale_dtype, **options)

    def stored(self, module: nn.Module, **activation) -> nn.Module:
        """The packed layer that takes the place of `module`, whose weight this is."""
        return packed(module, self.quantize(whole(matrix(module))), self.scheme(**activation))


class ActivationQuantizer(nn.Module):
    """8-bit inputs of a layer: a running range of what it saw in training, or (`dynamic`) each token's own.

    While `is_shared` the range is that of what all ranks see, which have to compute the layer together. Inputs that
    were all zero, as behind heads without values, have no range: they stay as they are.
    """

    is_shared = False
    was_called = False  # in training, whatever became of the range

    def __init__(self, *, dynamic: bool = False, name: str = "a layer"):
        super().__init__()
        self.dynamic, self.name = dynamic, name
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.dynamic:
            return round_per_token(x)
        if self.training and (x.numel() or self.is_shared) and not is_recomputing():
            self.was_called = True
            self.observe(x.detach())
        limits = self.range()
        return x if limits is None else round_to_range(x, *limits)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Raises ValueError, naming the layer, for inputs that no range can hold; what was seen before stays."""
        ends = (x.min(), x.max()) if x.numel() else (x.new_zeros(()),) * 2
        low, high = ends[0].float().clamp(max=0), ends[1].float().clamp(min=0)
        if self.is_shared:
            reach = torch.stack([-low, high]).nan_to_num(nan=torch.inf)  # so that all ranks raise
            dist.all_reduce(reach, dist.ReduceOp.MAX)
            low, high = -reach[0], reach[1]
        if not max(-float(low), float(high)) <= LARGEST_INPUT:  # NaN is not
            raise ValueError(
                f"The inputs of {self.name} reach from {float(low):g} to {float(high):g}: 8 bits hold no more than "
                f"{LARGEST_INPUT:g}, and no NaN. Check the model on this data, or train with activation_bits=None."
            )
        high = torch.where(high > low, high, ONLY_ZEROS)
        keep = RANGE_MOMENTUM if self.high - self.low >= SMALLEST_RANGE else 0.0
        self.low.mul_(keep).add_((1 - keep) * low)
        self.high.mul_(keep).add_((1 - keep) * high)

    @property
    def has_seen(self) -> bool:
        """Whether there was any input, of zeros too."""
        return bool(self.high > self.low)

    @property
    def is_idle(self) -> bool | None:
        """Whether nothing came in training; None where nothing has to."""
        return None if self.dynamic else not (self.has_seen or self.was_called)

    def range(self) -> tuple[float, float] | None:
        """The ends, or None where each token has its own, and where there was nothing but zeros yet."""
        low, high = float(self.low), float(self.high)
        return None if self.dynamic or high - low < SMALLEST_RANGE else (low, high)


@torch.no_grad()
def activation_ranges(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[Mapping]
) -> dict[str, tuple[float, float]]:
    """{name of a linear map: the range of its inputs}, ends of batches in the mean: what one strange text widens least.

    Raises ValueError, naming the map, for one that no input reaches and for inputs that no range of 8 bits can hold.
    """
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with evaluating([model]), input_hooks(
        {name: model.get_submodule(name) for name in names},
        lambda name, x: seen[name].append((float(x.min()), float(x.max()))) if x.numel() else None,
    ):  # fmt: skip
        for batch in progress_bar(batches, desc="Ranges of inputs", unit="batch"):
            run_model(model, batch)
    if missing := sorted(name for name, ends in seen.items() if not ends):
        raise ValueError(
            f"No calibration input reached {missing}. Leave them out with `skip_modules`, or calibrate with data that "
            "uses them (an encoder-decoder also needs `decoder_input_ids`)."
        )
    found = {}
    for name, ends in seen.items():
        low, high = (math.fsum(end) / len(ends) for end in zip(*ends, strict=True))
        found[name] = min(low, 0.0), max(high, 0.0)
        try:
            check_activation_range(*found[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error} Leave it out with `skip_modules`, or check the calibration.") from None
    return found
