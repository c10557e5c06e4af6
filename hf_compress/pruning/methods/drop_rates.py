"""Drop rates of layers that are learned, one for each, with a mean that is given.

Fan et al., 2020, https://arxiv.org/abs/1909.11556, section 3.2, "Data Driven Pruning"

    p_l = sigmoid(a_l + c), c such that the mean of p is the drop rate that was asked for
    s_l = sigmoid((log u - log(1 - u) - a_l - c) / b),  u ~ U(0, 1)          P(s_l > 1/2) = 1 - p_l
    layer l: f(x) if s_l > 1/2, else x; straight through, as if it were x + s_l (f(x) - x) for the gradient of a

The draws are relaxed as in Maddison et al., 2017, https://arxiv.org/abs/1611.00712. The paper divides the rate among
the layers by a softmax, whose shares can pass 1, of functions of activations; here logits are learned, and a shift that
they share holds the mean. As in the paper, which layers go does not depend on the text.
"""

import torch
from torch import Tensor

B = 2 / 3  # temperature of the draws
STEPS = 60  # each halves the interval of the shift


def rate_logits(a: Tensor, mean: float) -> Tensor:
    """log p / (1 - p) of the drop rates p (L,), whose mean is `mean`; with the gradient that this allows `a` (L,)."""
    wide, logit = a.detach().double(), torch.tensor(mean, dtype=torch.float64, device=a.device).logit()
    low, high = logit - wide.max(), logit - wide.min()
    for _ in range(STEPS):
        middle = (low + high) / 2
        is_less = torch.sigmoid(wide + middle).mean() < mean
        low, high = torch.where(is_less, middle, low), torch.where(is_less, high, middle)
    slope = torch.sigmoid(wide + low) * torch.sigmoid(-wide - low)
    weights = (slope / slope.sum().clamp(min=torch.finfo(slope.dtype).tiny)).to(a.dtype)
    return a + low.to(a.dtype) - (weights * (a - a.detach())).sum()  # dc / da_l = -weights_l


def draw(logits: Tensor) -> Tensor:
    """s (L,): above 1/2 for layers that run. By the CPU's generator, whose state Trainer saves for a resumed run."""
    u = torch.rand(len(logits), dtype=logits.dtype).clamp(1e-6, 1 - 1e-6).to(logits.device)
    return torch.sigmoid((u.logit() - logits) / B)


def passed(s: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """What leaves a layer that was drawn with `s`, a number: its output or its input, with a gradient for `s`."""
    chosen = torch.where(s > 0.5, output, x)
    return chosen + (s - s.detach()).to(x.dtype) * (output - x).detach()
