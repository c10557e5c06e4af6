"""Activations of 8 bits: one rounding, wherever it is computed."""

import numpy as np
import torch

from hf_compress.engines.rounding import LEVELS, grid_of_range, round_to_bytes, rounded_rows
from hf_compress.layers.activations import round_to_range
from hf_compress.quantization.fake_quantize import ActivationQuantizer


def test_every_rounding_to_a_range_gives_the_same_steps():
    """Beside halves, where a sum with the zero point would round in float32 before the steps are."""
    generator = torch.Generator().manual_seed(0)
    for low, high in ((-0.0878, 0.0850), (-1.3, 2.9), (0.0, 5.0), (-3.0, 0.0), (-0.7, 0.69)):
        scale, zero = grid_of_range(low, high)
        halves = torch.randint(-300, 300, (64, 64), generator=generator) + 0.5
        x = torch.cat([halves * scale, halves * scale * (1 + 2e-7), halves * scale * (1 - 2e-7)])
        steps = (x.numpy() / np.float32(scale)).astype(np.float64)  # one division in float32, halves to even after it
        q = np.clip(np.rint(steps), -zero, LEVELS - zero)
        expected = torch.from_numpy(q.astype(np.float32) * np.float32(scale))
        assert np.unique(steps % 1 == 0.5).tolist() == [False, True]  # real halves and others
        quantizer = ActivationQuantizer().eval()
        quantizer.low.fill_(low), quantizer.high.fill_(high)
        limits = quantizer.range()
        assert torch.equal(quantizer(x), expected)
        assert torch.equal(quantizer(x.double()).float(), expected)
        assert torch.equal(round_to_range(x.clone().requires_grad_(), *limits).detach(), expected)
        assert torch.equal(rounded_rows(x, limits), expected)
        made = round_to_bytes(x, limits)
        assert torch.equal((made.q.float() - made.zero) * made.scale, expected)
