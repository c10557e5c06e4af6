"""Trained ternary quantization: zero and two values of each row, or group of columns, that learn with the weights.

Zhu et al., 2017, https://arxiv.org/abs/1612.01064

    w_t = W_p where w > D,  -W_n where w < -D,  else 0;  D = t max |w|                             (eq. 6, 9)
    dL/dW_p = sum of dL/dw_t over the first,  dL/dW_n = minus the sum over the second              (eq. 7)
    dL/dw = W_p dL/dw_t over the first,  W_n dL/dw_t over the second,  dL/dw_t elsewhere           (eq. 8)

The paper's weights are divided by max |w| beforehand; here W_p and W_n are by max |w| in eq. 8 instead.
"""

import torch
from torch import Tensor, nn

from hf_compress.layers.codebook_linear import CodebookLinear
from hf_compress.layers.scheme import WeightScheme
from hf_compress.model.anatomy import matrix
from hf_compress.quantization.fake_quantize import WeightQuantizer
from hf_compress.quantization.grids import fits_float16
from hf_compress.training.shards import whole, write_

THRESHOLD = 0.05  # t, the paper's


def check_options(**is_given: bool) -> None:
    """Raise ValueError, naming them, for options of `prepare_qat` that a ternary grid has no use for."""
    if given := sorted(name for name, value in is_given.items() if value):
        raise ValueError(
            f"grid='ternary' learns two values of each row, or group of columns, of floating-point inputs: {given} say "
            "something else. Give activation_bits=None and leave out the others."
        )


class TrainedTernary(torch.autograd.Function):
    """Values (..., g) as W_p, 0 or -W_n of their row, all (..., 1), differentiable in values, W_p and W_n."""

    @staticmethod
    def forward(ctx, values: Tensor, positive: Tensor, negative: Tensor, threshold: Tensor) -> Tensor:
        above, below = values > threshold, values < -threshold
        ctx.save_for_backward(above, below, positive, negative, threshold)
        return positive * above - negative * below

    @staticmethod
    def backward(ctx, grad: Tensor):
        above, below, positive, negative, threshold = ctx.saved_tensors
        largest = (threshold / THRESHOLD).clamp(min=torch.finfo(threshold.dtype).tiny)
        passed = torch.where(above, positive / largest, torch.where(below, negative / largest, 1.0))
        sums = [(grad * chosen).sum(-1, keepdim=True) for chosen in (above, below)]
        return grad * passed, sums[0], -sums[1], None


class TernaryQuantizer(WeightQuantizer):
    """Keeps W_p and W_n, `scale` (N, G, 2), and the threshold (N, G, 1) of one weight (N, K).

    The threshold follows the weights in training; in evaluation it is that of the last pass, and so it is stored.
    """

    GRID = ("scale", "threshold")
    NUM_SCALES = 2

    @torch.no_grad()
    def refresh(self, weight: Tensor, bits: int | None = None) -> None:
        """W_p and W_n are the means of what lies above and below, the nearest values there are."""
        blocks = self.blocks(weight.float())
        self.scale_dtype = "float16" if fits_float16(blocks, self.bits, symmetric=True) else "float32"
        self._follow(blocks)
        found = []
        for values in (blocks, -blocks):
            chosen = values > self.threshold
            mean = (values * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)
            found.append(torch.where(chosen.any(-1), mean, blocks.abs().mean(-1)))
        write_(self.scale, torch.stack(found, -1))

    @torch.no_grad()
    def _follow(self, blocks: Tensor) -> None:
        self.threshold.copy_(THRESHOLD * blocks.abs().amax(-1, keepdim=True))

    def forward(self, weight: Tensor) -> Tensor:
        blocks = self.blocks(weight.float())
        if self.training:
            self._follow(blocks)
        threshold = self.threshold.clone()  # a weight may be used twice in a pass, and follows each time
        values = TrainedTernary.apply(blocks, *self.stored_scale().split(1, -1), threshold)
        return self.unblocks(values).to(weight.dtype)

    def scheme(self, **options) -> WeightScheme:
        return super().scheme(num_levels=3, **options)

    @torch.no_grad()
    def stored(self, module: nn.Module, **activation) -> CodebookLinear:
        """Indices into -W_n, 0 and W_p."""
        self.eval()
        blocks = self.blocks(whole(matrix(module)).float())
        index = 1 + (blocks > self.threshold).int() - (blocks < -self.threshold).int()
        positive, negative = self.stored_scale().split(1, -1)
        levels = torch.cat([-negative, torch.zeros_like(positive), positive], -1)  # (N, G, 3)
        layer = CodebookLinear.like(module, self.scheme(**activation))
        return layer.fill(index.flatten(1), levels.transpose(0, 1).contiguous()).train(module.training)
