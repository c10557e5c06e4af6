"""Round to nearest: each weight takes the nearest value of its group's grid. The baseline of every table."""

import torch
from torch import Tensor

from hf_compress.layers.scheme import SCALE_DTYPES, WeightScheme
from hf_compress.quantization.gptq import QuantizedWeight
from hf_compress.quantization.grids import find_grid, group_rows, quantize_to_grid


def round_to_nearest(weight: Tensor, scheme: WeightScheme, *, range_method: str = "mse", name: str = "the weight"):
    """Quantize a weight (N, K), or the rows of an embedding (V, D), on the grid of each group."""
    if not weight.isfinite().all():
        raise ValueError(f"The weight of {name} holds NaN or infinity; it cannot be quantized.")
    groups = group_rows(weight.float(), scheme.group_size)  # (N, G, g)
    scale, zero_point = find_grid(groups, scheme.bits, symmetric=scheme.symmetric, range_method=range_method,
                                  scale_dtype=SCALE_DTYPES[scheme.scale_dtype])  # fmt: skip
    q = quantize_to_grid(groups, scale, zero_point, scheme.bits)
    g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // groups.shape[-1]
    return QuantizedWeight(
        q.flatten(1).to(torch.uint8),
        scale[..., 0].t().contiguous(),
        zero_point[..., 0].t().contiguous().to(torch.uint8),
        g_idx,
    )
