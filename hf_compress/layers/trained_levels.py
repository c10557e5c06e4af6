"""Codebook layers whose levels are trained: w[n, k] = c[n, index[n, k]], with the indices as they are.

Han et al., 2016, https://arxiv.org/abs/1510.00149, section 3.3: the gradient of a centroid is the sum of the gradients
of the weights that share it, dL/dc[n, l] = sum over k with index[n, k] = l of dL/dw[n, k].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.layers.codebook_linear import CodebookLinear, Levels, unpack_indices
from hf_compress.layers.trained_form import TrainedForm


class LevelProduct(torch.autograd.Function):
    """x (M, K) times the weight c[index]: (M, N), differentiable in x and c.

    The weight, in x's dtype, is made for the product and again for the gradients; it is never kept.

    c      (N, G, L)  float32
    index  (N, G, g)  uint8
    """

    @staticmethod
    def forward(ctx, x: Tensor, c: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, c, index)
        return F.linear(x, c.to(x.dtype).gather(2, index.long()).flatten(1))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, c, index = ctx.saved_tensors
        chosen = index.long()
        grad_x = grad @ c.to(grad.dtype).gather(2, chosen).flatten(1) if ctx.needs_input_grad[0] else None
        grad_c = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad.t() @ x).view_as(index)  # (N, G, g)
            grad_c = torch.zeros_like(c).scatter_add_(2, chosen, of_weight.to(c.dtype))
        return grad_x, grad_c, None


def read_index(stored: Levels) -> Tensor:
    """The indices (N, G, g) of a stored codebook, uint8."""
    return unpack_indices(stored.words, stored.bits, stored.in_features).unflatten(1, (len(stored.levels), -1))


def are_powers_of_two(levels: Tensor) -> bool:
    """Whether levels (..., L) are plus and minus powers of two around a pair of zeros, as that grid has them."""
    L = levels.shape[-1]
    mantissa, _ = torch.frexp(levels[levels != 0].float().abs())
    is_pair = L >= 4 and not levels[..., L // 2 - 1 : L // 2 + 1].any()
    return is_pair and bool(len(mantissa)) and bool((mantissa == 0.5).all())


class TrainedLevels(TrainedForm):
    """The form of a codebook layer whose levels are trained.

    t     (N, G, L)  float32; a level is its first value plus t times `unit`
    c0    (N, G, L)  the first values
    unit  (N, G, 1)  the largest magnitude among them, so that rates are shares of it as those of scales are

    A level of zero stays zero, as what pruning silenced has to, and levels that mirror each other around zero, as
    binary and ternary ones do, go on doing so.
    """

    read = staticmethod(read_index)

    def __init__(self, layer: CodebookLinear):
        super().__init__(layer)
        self.register_buffer("c0", layer.levels.float().transpose(0, 1).contiguous())
        self.register_buffer("unit", self.c0.abs().amax(-1, keepdim=True))
        self.t = nn.Parameter(torch.zeros_like(self.c0))

    def levels(self) -> Tensor:
        """(N, G, L) float32, with the values of the stored dtype."""
        is_mirrored = (self.c0 == -self.c0.flip(-1)).all(-1, keepdim=True)
        t = torch.where(is_mirrored, (self.t - self.t.flip(-1)) / 2, self.t) * (self.c0 != 0)
        return self.as_stored(self.c0 + self.unit * t)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return LevelProduct.apply(x, self.levels(), index)

    @torch.no_grad()
    def kept_numbers(self) -> Tensor:
        return self.levels().transpose(0, 1).to(self.dtype).contiguous()  # (G, N, L)

    def weight_of(self, layer: CodebookLinear) -> Levels:
        return layer.stored()._replace(levels=self.kept_numbers())

    def buffers_of(self, layer: CodebookLinear) -> dict[str, Tensor]:
        return {"levels": self.kept_numbers()}
