"""compressed-tensors files (`pack-quantized`), which vLLM and Transformers read.

For each linear layer (N, K), and each table (V, D) alike: weight_packed int32 (N, K * bits / 32), packed along the row;
weight_scale (N, G); weight_zero_point int32 (N * bits / 32, G), packed along N, only where asymmetric; weight_shape.
Integers are stored as unsigned, which is what they are here. With 8-bit inputs, `int-quantized`: weight and
weight_zero_point int8, and where the inputs have a calibrated range input_scale and input_zero_point.
"""

import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.checkpoint.bits import packed_modules
from hf_compress.engines.ops import pack_rows, pack_zeros
from hf_compress.engines.rounding import grid_of_range
from hf_compress.formats.compressed_tensors_modules import PACKED
from hf_compress.layers.packed_embedding import PackedEmbedding
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme


def compressed_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
    """State dict and `quantization_config` of `model`. Raises ValueError for what the format cannot express."""
    state, groups = model.state_dict(), {}
    for name, module in packed_modules(model):
        is_known = module.scheme.num_levels is None and not getattr(module, "is_conv1d", False)
        if not is_known or module.scheme.desc_act:
            raise ValueError(
                f"{name}: compressed-tensors, as its readers know it, has uniform grids of neighbouring columns for "
                "nn.Linear and tables; no codebooks, no Conv1D, no stored act-order. Export as 'plain', or quantize "
                "without them (desc_act with static_groups stores no order)."
            )
        own = [key for key in state if key.rpartition(".")[0] == name and not key.endswith(".bias")]
        for key in own:
            del state[key]
        state |= {f"{name}.{part}": tensor for part, tensor in _tensors(module).items()}
        groups.setdefault(json.dumps(_group(module)), []).append(name)
    if not groups:
        raise ValueError("The model has no packed layer: quantize it first.")
    packed = {name for names in groups.values() for name in names}
    entries = [{"targets": names, **json.loads(group)} for group, names in groups.items()]
    formats = {entry["format"] for entry in entries}
    return state, {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed],
        "config_groups": {f"group_{i}": entry for i, entry in enumerate(entries)},
    }


def _format(scheme: WeightScheme) -> str:
    return "int-quantized" if scheme.bits == 8 and scheme.activation_bits else PACKED


def _tensors(module: PackedLinear | PackedEmbedding) -> dict[str, Tensor]:
    scheme, is_table = module.scheme, isinstance(module, PackedEmbedding)
    if is_table:
        q, _, zeros = module.integers()  # (V, D), (V, G)
    else:
        q, zeros, _ = module.integers()  # (N, K), (G, N)
        zeros = zeros.t()
    found = {"weight_scale": module.scales if is_table else module.scales.t()}
    if _format(scheme) == PACKED:
        found |= {"weight_packed": pack_rows(q, scheme.bits), "weight_shape": torch.tensor(q.shape)}
    else:
        found["weight"] = (q.short() - 128).char()
    if not scheme.symmetric and _format(scheme) == PACKED:
        found["weight_zero_point"] = pack_zeros(zeros.t(), scheme.bits).t()
    elif not scheme.symmetric:
        found["weight_zero_point"] = (zeros.short() - 128).char()
    if scheme.activation_range is not None:
        scale, zero_point = grid_of_range(*scheme.activation_range)
        found |= {"input_scale": torch.tensor([scale]), "input_zero_point": torch.tensor([zero_point - 128]).char()}
    return found


def _group(module: PackedLinear | PackedEmbedding) -> dict:
    scheme = module.scheme
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == -1:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    inputs = None
    if scheme.activation_bits is not None:
        is_dynamic = scheme.activation_range is None
        inputs = {"num_bits": 8, "type": "int", "symmetric": is_dynamic, "dynamic": is_dynamic,
                  "strategy": "token" if is_dynamic else "tensor"}  # fmt: skip
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": _format(scheme)}
