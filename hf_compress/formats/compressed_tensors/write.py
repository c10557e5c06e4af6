"""compressed-tensors files (`pack-quantized`), which vLLM and Transformers read.

For each linear layer (N, K): weight_packed int32 (N, K * bits / 32), packed along the row; weight_scale (N, G);
weight_zero_point int32 (N * bits / 32, G), packed along N, only where asymmetric; weight_shape. Integers are stored as
unsigned, which is what they are here.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.bits import packed_modules
from hf_compress.engines.ops import pack_rows, pack_zeros
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme


def compressed_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
    """State dict and `quantization_config` of `model`. Raises ValueError for what the format cannot express."""
    state, groups = model.state_dict(), {}
    for name, module in packed_modules(model):
        scheme = module.scheme
        if not isinstance(module, PackedLinear) or module.is_conv1d or scheme.activation_bits or scheme.desc_act:
            raise ValueError(
                f"{name}: compressed-tensors, as its readers know it, has packed nn.Linear weights with neighbouring "
                "groups; no codebooks, embeddings, Conv1D, activation bits or stored act-order. Export as "
                "'plain', or quantize without them (desc_act with static_groups stores no order)."
            )
        q, zeros, _ = module.integers()
        for part in ("qweight", "qzeros", "scales"):
            state.pop(f"{name}.{part}", None)
        state[f"{name}.weight_packed"] = pack_rows(q, scheme.bits)
        state[f"{name}.weight_scale"] = module.scales.t()
        state[f"{name}.weight_shape"] = torch.tensor(q.shape)
        if not scheme.symmetric:
            state[f"{name}.weight_zero_point"] = pack_zeros(zeros, scheme.bits).t()
        groups.setdefault(scheme, []).append(name)
    if not groups:
        raise ValueError("The model has no packed layer: quantize it first.")
    packed = {name for names in groups.values() for name in names}
    return state, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed],
        "config_groups": {f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(groups.items())},
    }


def _group(scheme: WeightScheme, names: list[str]) -> dict:
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == -1:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    return {"targets": names, "weights": weights, "input_activations": None, "output_activations": None,
            "format": "pack-quantized"}  # fmt: skip
