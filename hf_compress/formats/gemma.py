"""Transformers' built-in `gemma` format: packed weights that load without any plugin, for every architecture.

For each linear layer (N, K): weight uint8 (N, K * bits / 8) at 2 and 4 bit, lowest bits first, or int8 (N, K);
symmetric, one float32 scale a row. No 3 bit, no groups, no zero points.
"""

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.bits import packed_modules
from hf_compress.engines.ops import pack_rows
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.model.record import stored_name


def gemma_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
    """State dict and `quantization_config` of `model`. Raises ValueError for what the format cannot express."""
    state, bits = model.state_dict(), {}
    for name, module in packed_modules(model):
        scheme = module.scheme
        is_plain = isinstance(module, PackedLinear) and not module.is_conv1d and scheme.activation_bits is None
        if not is_plain or scheme.bits == 3 or not scheme.symmetric or len(module.scales) != 1 or scheme.desc_act:
            raise ValueError(
                f"{name}: the gemma format has nn.Linear weights of 2, 4 or 8 bit, symmetric, one scale a row; this "
                f"one is {scheme}. Quantize with symmetric=True, group_size=-1, or export as 'plain'."
            )
        for part in ("qweight", "scales"):
            del state[f"{name}.{part}"]
        q, _, _ = module.integers()
        if scheme.bits == 8:
            weight = (q.int() - 128).to(torch.int8)
        else:
            width = -(-module.in_features * scheme.bits // 8)
            weight = pack_rows(q, scheme.bits).view(torch.uint8)[:, :width]
        state[f"{name}.weight"] = weight
        state[f"{name}.weight_scale"] = module.scales.t().float()
        for part in ("input_activation_scale", "output_activation_scale"):
            state[f"{name}.{part}"] = torch.tensor(0.0)  # not calibrated: activations stay as they are
        bits[name] = scheme.bits
    if not bits:
        raise ValueError("The model has no packed layer: quantize it first.")
    return state, {
        "quant_method": "gemma",
        "num_bits": 8,
        "quantize_embeddings": False,
        "module_quant_configs": {f"{re.escape(stored_name(model, n))}$": {"num_bits": b} for n, b in bits.items()},
        "modules_to_not_convert": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in bits],
    }
