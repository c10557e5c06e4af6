"""The kernels' layouts of a packed weight on a GPU, and their products.

A layout holds the integers of the stored words in another order, so that a layer on a GPU keeps it alone: `integers`
gives back what is stored, bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from hf_compress.engines.ops import w8a8_linear, wna16_linear, wna16_pack, wna16_unpack
from hf_compress.engines.packed_weight import Stored

HALVES = torch.float16, torch.bfloat16

logger = logging.get_logger(__name__)


def takes(device: torch.device) -> bool:
    """Whether the kernels run there; ROCm calls itself CUDA too. Other devices dequantize in each call."""
    return device.type == "cuda"


class Wna16:
    """Weights of few bits by activations of 16 bit; inputs of another dtype multiply the dequantized weight.

    A float32 model's layout is for bfloat16, which autocast hands to its layers.
    """

    name, traceable, rounds = "wna16 kernel", True, False

    def __init__(self, stored: Stored, dtype: torch.dtype):
        weight = stored.weight()
        group_size = -1 if stored.num_groups == 1 else stored.group_size
        dtype = dtype if dtype in HALVES else torch.bfloat16
        self.dtype, self.rest = dtype, stored._replace(words=None)
        self.weight = wna16_pack(
            weight.q, stored_by_groups(weight.scales), stored_by_groups(weight.zeros), stored.bits, group_size, dtype,
            stored.g_idx,
        )  # fmt: skip

    def integers(self) -> Tensor:
        """(N, K) uint8, as stored."""
        return wna16_unpack(self.weight)[0]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if x.dtype != self.dtype:
            return F.linear(x, self.rest.weight_of(self.integers()).dequantize(x.dtype), bias)
        return wna16_linear(x, self.weight, bias)


class W8A8:
    """Products of 8-bit integers, each token rounded to its own grid. 1 byte a weight."""

    name, traceable, rounds = "w8a8 kernel", True, True

    def __init__(self, stored: Stored):
        weight = stored.weight()
        self.weight, self.scales = weight.signed().char(), weight.scales[:, 0].float()

    def integers(self) -> Tensor:
        """(N, K) uint8, as stored: such weights are symmetric."""
        return (self.weight.short() + 128).to(torch.uint8)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return w8a8_linear(x, self.weight, self.scales, bias)


Layout = Wna16 | W8A8


def stored_by_groups(values: Tensor) -> Tensor:
    """(N, G) -> (G, N), as GPTQ and the kernels order them."""
    return values.t().contiguous()


def make_run(stored: Stored, dtype: torch.dtype, *, int8: bool) -> Layout | None:
    """The run on the GPU that holds the weight; None, with one warning for each reason, for what no kernel takes.

    int8  the layer's record asks for products of 8-bit integers, each token rounded to its own grid
    """
    try:
        return W8A8(stored) if int8 else Wna16(stored, dtype)
    except ValueError as error:
        logger.warning_once(f"A packed layer runs without its kernel, dequantized in each call: {error}")
        return None
