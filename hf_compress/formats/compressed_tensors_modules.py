"""One module of a compressed-tensors checkpoint as the tensors of a packed layer.

For a linear layer (N, K), or a table (V, D), the file holds

    pack-quantized   weight_packed int32 (N, K * bits / 32), packed along the row; weight_shape;
                     weight_zero_point int32 (N * bits / 32, G), packed along N, or int8 where the strategy is "tensor"
    int-quantized    weight int8 (N, K); weight_zero_point int8 (N, G)
    both             weight_scale (N, G), (N, 1) or (1,); weight_g_idx int32 (K,) in older files with act-order;
                     input_scale and input_zero_point (1,) where the inputs have a calibrated range

w = scale * (q - zero_point) with signed integers. Packed ones have 2^(bits - 1) added, as they are in our layers, so
words are only turned round.
"""

import torch
from torch import Tensor, nn

from hf_compress.engines.ops import pack_rows, pack_zeros, unpack_rows, words_per_row
from hf_compress.layers.scheme import WeightScheme, check_activation_range

PACKED, UNPACKED = "pack-quantized", ("int-quantized", "naive-quantized")
ONE = [(1,), (1, 1), ()]  # shapes of one number for a whole tensor
PARTS = ("weight_packed", "weight_shape", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale",
         "input_zero_point")  # fmt: skip


def convert_module(name: str, module: nn.Module, group: dict, state: dict[str, Tensor]) -> WeightScheme:
    """Changes `state`: the tensors of the module become those of a packed layer. Returns how it is packed.

    group: its entry of `config_groups`, with the format. Raises ValueError, naming it, for what does not fit together.
    """
    own = [key for key in state if key.rpartition(".")[0] == name and not key.endswith(".bias")]
    found = {key.rpartition(".")[2]: state.pop(key) for key in own}
    needed = (
        {"weight_packed", "weight_scale", "weight_shape"} if group["format"] == PACKED else {"weight", "weight_scale"}
    )
    if found.keys() - set(PARTS) or needed - found.keys():
        raise ValueError(f"{name}: {group['format']} needs {sorted(needed)} and knows {PARTS}, got {sorted(found)}.")
    weights, is_table = group["weights"], isinstance(module, nn.Embedding)
    bits, (N, K) = weights["num_bits"], module.weight.shape
    scales = _scales(name, found["weight_scale"], weights, N, K)
    G = scales.shape[1]
    words = _words(name, found, bits, N, K)
    zeros = _zero_points(name, found.get("weight_zero_point"), bits, N, G)
    is_symmetric = zeros is None or bool((zeros == 2 ** (bits - 1)).all())
    said = weights.get("symmetric", is_symmetric)
    if not isinstance(said, bool) or (said and not is_symmetric) or (not said and zeros is None):
        raise ValueError(f"{name} has {'no' if zeros is None else 'other'} zero points than symmetric={said!r} says.")
    g_idx = _order(name, found.get("weight_g_idx"), K, G)
    if is_table and (g_idx is not None or group.get("input_activations")):
        raise ValueError(f"{name} is a {type(module).__name__}: act-order and quantized inputs are for linear layers.")
    packed = {"qweight": words if is_table else words.t(), "scales": scales if is_table else scales.t()}
    if not is_symmetric:
        packed |= {"zeros": zeros} if is_table else {"qzeros": pack_zeros(zeros.t(), bits)}
    if g_idx is not None:
        packed["g_idx"] = g_idx
    state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    scale_dtype = "float16" if scales.dtype == torch.float16 else "float32"
    return WeightScheme(bits, -1 if G == 1 else K // G, is_symmetric, g_idx is not None, scale_dtype,
                        **_inputs(name, group.get("input_activations"), found))  # fmt: skip


def _scales(name: str, scales: Tensor, weights: dict, N: int, K: int) -> Tensor:
    """(N, G), float16 where they were, else float32, which holds bfloat16 exactly."""
    strategy, size = weights["strategy"], weights.get("group_size")
    if strategy == "group" and (not isinstance(size, int) or size < 1 or K % size):
        raise ValueError(f"{name}: group_size must divide the {K} columns, got {size!r}.")
    G = K // size if strategy == "group" else 1
    shapes = ONE if strategy == "tensor" else _shapes(N, G)
    if tuple(scales.shape) not in shapes or scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}.weight_scale must be {shapes[0]} ({strategy} strategy, weight {(N, K)}) of float16, bfloat16 or "
            f"float32, got {tuple(scales.shape)} of {scales.dtype}."
        )
    scales = scales.expand(N, 1) if strategy == "tensor" else scales.reshape(N, G)
    return scales if scales.dtype == torch.float16 else scales.float()


def _shapes(N: int, G: int) -> list[tuple[int, ...]]:
    """Of one number a group: the usual one first. Others of as many numbers may be another order of them."""
    return [(N, G), (N,)] if G == 1 else [(N, G)]


def _words(name: str, found: dict[str, Tensor], bits: int, N: int, K: int) -> Tensor:
    """The unsigned integers, packed along the row: int32 (N, K * bits / 32)."""
    if "weight_packed" in found:
        words, shape = found["weight_packed"], (N, words_per_row(K, bits))
        stored = found.get("weight_shape", torch.tensor([N, K])).tolist()
        if tuple(words.shape) != shape or words.dtype != torch.int32 or stored != [N, K]:
            raise ValueError(
                f"{name}: {bits} bits of a weight {(N, K)} are {shape} int32 words, packed without gaps; got "
                f"weight_packed {tuple(words.shape)} of {words.dtype} and weight_shape {stored}."
            )
        return words
    weight = found["weight"]
    if tuple(weight.shape) != (N, K) or weight.dtype != torch.int8:
        raise ValueError(f"{name}.weight must be int8 {(N, K)}, got {weight.dtype} {tuple(weight.shape)}.")
    return pack_rows(_unsigned(f"{name}.weight", weight, bits), bits)


def _zero_points(name: str, zeros: Tensor | None, bits: int, N: int, G: int) -> Tensor | None:
    """(N, G) uint8; None where the file has none."""
    if zeros is None:
        return None
    words = (words_per_row(N, bits), G)
    if zeros.dtype == torch.int32 and tuple(zeros.shape) == words:
        return unpack_rows(zeros.t(), bits, N).t()
    if zeros.dtype != torch.int8 or tuple(zeros.shape) not in [*_shapes(N, G), *ONE]:
        raise ValueError(
            f"{name}.weight_zero_point must be int32 {words} or int8 {(N, G)}, got {zeros.dtype} {tuple(zeros.shape)}."
        )
    zeros = _unsigned(f"{name}.weight_zero_point", zeros, bits)
    return zeros.expand(N, G) if zeros.numel() == 1 else zeros.reshape(N, G)


def _unsigned(name: str, values: Tensor, bits: int) -> Tensor:
    values = values.int() + 2 ** (bits - 1)
    low, high = map(int, values.aminmax())
    if low < 0 or high >= 2**bits:
        half = 2 ** (bits - 1)
        raise ValueError(f"{name} must lie in [{-half}, {half - 1}], got [{low - half}, {high - half}].")
    return values.to(torch.uint8)


def _order(name: str, g_idx: Tensor | None, K: int, G: int) -> Tensor | None:
    """The group of each column (K,) int32; None where groups are neighbouring columns, which -1 may also say."""
    if g_idx is None or (tuple(g_idx.shape) == (K,) and (g_idx == -1).all()):
        return None
    fits = tuple(g_idx.shape) == (K,) and g_idx.dtype in (torch.int32, torch.int64)
    if not fits or int(g_idx.min()) < 0 or int(g_idx.max()) >= G:
        raise ValueError(
            f"{name}.weight_g_idx must hold {K} numbers in [0, {G - 1}], got {tuple(g_idx.shape)} of {g_idx.dtype} in "
            f"[{int(g_idx.min())}, {int(g_idx.max())}]."
        )
    return None if torch.equal(g_idx.long(), torch.arange(K) // (K // G)) else g_idx.int()


def _one(name: str, tensor: Tensor, *dtypes: torch.dtype) -> float:
    if tuple(tensor.shape) not in ONE or tensor.dtype not in dtypes:
        raise ValueError(f"{name} must hold one number of {dtypes}, got {tuple(tensor.shape)} of {tensor.dtype}.")
    return tensor.item()


def _inputs(name: str, inputs: dict | None, found: dict[str, Tensor]) -> dict:
    """`activation_bits` and `activation_range` of the scheme."""
    if not inputs:
        return {}
    dynamic, strategy, symmetric = inputs.get("dynamic"), inputs.get("strategy"), inputs.get("symmetric")
    is_int8 = inputs.get("num_bits") == 8 and inputs.get("type") == "int"
    if is_int8 and dynamic is True and strategy == "token" and symmetric:
        return {"activation_bits": 8}
    if is_int8 and dynamic is False and strategy == "tensor" and "input_scale" in found:
        scale = _one(f"{name}.input_scale", found["input_scale"], torch.float16, torch.bfloat16, torch.float32)
        zero = _one(f"{name}.input_zero_point", found.get("input_zero_point", torch.zeros(1).char()), torch.int8)
        limits = (-128 - zero) * scale, (127 - zero) * scale
        try:
            check_activation_range(*limits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return {"activation_bits": 8, "activation_range": limits}
    raise ValueError(
        f"{name}: inputs of {inputs.get('num_bits')} bits ({inputs.get('type')}, strategy {strategy!r}, "
        f"dynamic={dynamic}, symmetric={symmetric}) are not read; known are 8-bit integers with each token's own "
        "symmetric range, or with one calibrated range."
    )
