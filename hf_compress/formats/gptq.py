"""GPTQ checkpoints: what AutoGPTQ, GPTQModel and others write and read.

For each linear layer, K inputs and N outputs: qweight int32 (K * bits / 32, N), qzeros int32 (G, N * bits / 32),
scales float16 (G, N), g_idx int32 (K,). Format "gptq" (v1) stores each zero point minus one, "gptq_v2" as it is. The
layers here have the same tensors, so a foreign checkpoint is loaded by `from_pretrained` and settled afterwards.
"""

import json
import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import hf_compress
from hf_compress.checkpoint.bits import packed_modules, settle_bits
from hf_compress.checkpoint.tensors import Stored, read_headers
from hf_compress.engines.ops import pack_zeros
from hf_compress.formats.foreign import find_folder, matches, model_class, telling
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import BITS, WeightScheme
from hf_compress.model.anatomy import module_names
from hf_compress.model.record import QUANT_METHOD, VERSION

logger = logging.getLogger(__name__)

KINDS = {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32", "I64"), "scales": ("F16", "BF16", "F32")}
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # what a format subtracts from each zero point


def load_gptq(folder_or_id: str | Path, **kwargs) -> PreTrainedModel:
    """Someone else's GPTQ checkpoint on our layers: v1 and v2, act-order, different bits for different modules.

    folder_or_id: a folder, or the name of a repository on the Hub. kwargs go to `from_pretrained`. The result is a
    model like any that `quantize` returns: it saves in our own format and can be exported.

    Raises ValueError, naming the tensor, for shapes, bits or indices that do not fit together.
    """
    folder = find_folder(folder_or_id)
    with telling(folder):
        config = AutoConfig.from_pretrained(folder)
    settings = _settings(config, folder)
    stored = read_headers(sorted(folder.glob("*.safetensors")))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    names = sorted(name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight"))
    if not names:
        raise ValueError(f"{folder} holds no `qweight` tensor: it is not a GPTQ checkpoint.")
    kind = model_class(config, folder)
    prefix = f"{kind.base_model_prefix}."
    bits = {}
    for name in names:
        scheme = _scheme(name, shapes)
        scheme = replace(scheme, scale_dtype=_scale_dtype(name, stored))
        _check_said(name, scheme, shapes[f"{name}.g_idx"][0], settings)
        bits[name.removeprefix(prefix)] = scheme.to_dict()
    config.quantization_config = {"quant_method": QUANT_METHOD, "version": VERSION, "bits": bits}
    with telling(folder):
        model = kind.from_pretrained(folder, config=config, **kwargs)
    offset = ZERO_OFFSETS[settings["format"]]
    for name, module in packed_modules(model):
        _settle(name, module, offset, settings)
    settle_bits(model)
    return model


def _settings(config, folder: Path) -> dict:
    """What the two config files say, the one beside the weights first."""
    settings = getattr(config, "quantization_config", None)
    if settings is None and (folder / "quantize_config.json").exists():
        settings = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
    if settings is None:
        raise ValueError(f"{folder} has no quantization_config and no quantize_config.json: it is not quantized.")
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method", "gptq")
    if method != "gptq":
        raise ValueError(f"{folder} was quantized by {method!r}; load_gptq reads 'gptq'.")
    if not isinstance(settings.get("dynamic") or {}, dict) or not all(
        isinstance(rule, str) and isinstance(changes, dict) for rule, changes in (settings.get("dynamic") or {}).items()
    ):
        raise ValueError(f"{folder}: `dynamic` must map patterns to settings, got {settings['dynamic']!r}.")
    found = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if not isinstance(found, str) or found not in ZERO_OFFSETS:
        raise ValueError(f"{folder} has the GPTQ format {found!r}; known are {sorted(ZERO_OFFSETS)}.")
    return {**settings, "format": found}


def _scheme(name: str, shapes: dict[str, list[int]]) -> WeightScheme:
    """Bits and groups as the shapes say them."""
    try:
        words, N = shapes[f"{name}.qweight"]
        (K,), (G, scales_N) = shapes[f"{name}.g_idx"], shapes[f"{name}.scales"]
        zero_groups, zero_words = shapes[f"{name}.qzeros"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} needs qweight, qzeros, scales and g_idx of two and one dimensions.") from error
    bits = words * 32 // K if K else 0
    fits = words * 32 == K * bits and scales_N == N and zero_groups == G and zero_words == -(-N * bits // 32)
    if bits not in BITS or not fits or G == 0 or K % G:
        raise ValueError(
            f"{name}: qweight {(words, N)}, qzeros {(zero_groups, zero_words)}, scales {(G, scales_N)} and g_idx "
            f"{(K,)} do not fit together at any of {BITS} bits with equal groups."
        )
    return WeightScheme(bits, -1 if G == 1 else K // G, desc_act=True)


def _scale_dtype(name: str, stored: dict[str, Stored]) -> str:
    """Of the scheme: float32 also holds bfloat16 exactly. Raises ValueError for words and scales of other kinds."""
    found = {part: stored[f"{name}.{part}"].dtype for part in KINDS}
    if odd := {part: dtype for part, dtype in found.items() if dtype not in KINDS[part]}:
        raise ValueError(f"{name}: expected {', '.join(f'{part} of {KINDS[part]}' for part in odd)}, got {odd}.")
    return "float16" if found["scales"] == "F16" else "float32"


def _check_said(name: str, scheme: WeightScheme, in_features: int, settings: dict) -> None:
    """Raise ValueError where the config says of a module other bits or groups than its tensors have."""
    said = dict(settings)
    for rule, changes in (settings.get("dynamic") or {}).items():
        if matches(rule.removeprefix("+:").removeprefix("-:"), name):
            said |= {} if rule.startswith("-:") else changes
    found = {"bits": scheme.bits, "group_size": in_features if scheme.group_size == -1 else scheme.group_size}
    if said.get("group_size") in (-1, in_features):
        said["group_size"] = in_features
    for key, value in found.items():
        if said.get(key, value) != value:
            raise ValueError(
                f"{name} has {key} {value} by its tensors, and {said[key]!r} by the config: they are of two models, or "
                "one is damaged."
            )


def _settle(name: str, module: PackedLinear, offset: int, settings: dict) -> None:
    """Undo the format's offset; keep `g_idx` only where groups are not neighbouring columns."""
    bits, K, G = module.scheme.bits, module.in_features, len(module.scales)
    g_idx = module.g_idx
    _, stored, _ = module.integers()
    middle = 2 ** (bits - 1)
    if settings.get("sym"):  # here the values tell the format, whatever the label says
        for format_offset in ZERO_OFFSETS.values():
            if (stored == middle - format_offset).all() and format_offset != offset:
                logger.warning(
                    f"{name}: the zero points are not those of {settings['format']!r}; reading them as they are."
                )
                offset = format_offset
    zeros = (stored + offset) & (2**bits - 1)
    is_ordered = torch.equal(module.g_idx.long(), torch.arange(K, device=g_idx.device) // (K // G))
    is_symmetric = bool((zeros == middle).all())
    for key, is_said, is_so in (("sym", True, is_symmetric), ("desc_act", False, not is_ordered)):
        if settings.get(key) is is_said and is_so is not is_said:
            raise ValueError(f"{name} is not what the config says with {key}={is_said}: one of the two is damaged.")
    module.scheme = replace(module.scheme, symmetric=is_symmetric, desc_act=not is_ordered)
    module.qzeros = None if module.scheme.symmetric else pack_zeros(zeros, bits)
    if is_ordered:
        module.g_idx = None
    module.prepare()


def gptq_tensors(model: PreTrainedModel, checkpoint_format: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """State dict and `quantization_config` of `model` in GPTQ's format.

    checkpoint_format: "gptq" (v1) or "gptq_v2"; by default v1 where every weight is symmetric. An asymmetric zero point
    of 0 wraps in v1, so GPTQModel reads asymmetric v1 files only if it wrote them itself.

    Raises ValueError, naming the module, for what the format cannot express.
    """
    state, schemes = model.state_dict(), {}
    if checkpoint_format is None:
        is_symmetric = all(module.scheme.symmetric for _, module in packed_modules(model))
        checkpoint_format = "gptq" if is_symmetric else "gptq_v2"
    for name, module in packed_modules(model):
        scheme = module.scheme
        if not isinstance(module, PackedLinear) or scheme.activation_bits is not None:
            raise ValueError(
                f"{name}: a GPTQ checkpoint holds linear weights only, no codebooks, packed embeddings or "
                "activation ranges. Export as 'plain', or quantize without them."
            )
        N, K = module.out_features, module.in_features
        if K * scheme.bits % 32 or N * scheme.bits % 32:
            raise ValueError(f"{name}: GPTQ packs whole words, but {N} x {K} at {scheme.bits} bits does not fill them.")
        if scheme.scale_dtype != "float16":
            raise ValueError(
                f"{name}: a GPTQ checkpoint has float16 scales, and these are {scheme.scale_dtype}. Quantize with "
                "scale_dtype='float16', or leave out with `skip_modules` what that refuses."
            )
        _, zeros, groups = module.integers()
        state[f"{name}.qzeros"] = pack_zeros(zeros, scheme.bits, ZERO_OFFSETS[checkpoint_format])
        state[f"{name}.g_idx"] = groups.int()
        schemes[name] = scheme
    if not schemes:
        raise ValueError("The model has no packed layer: quantize it first.")
    return state, _gptq_config(model, schemes, checkpoint_format)


def _gptq_config(model: PreTrainedModel, schemes: dict[str, WeightScheme], checkpoint_format: str) -> dict:
    common = Counter((s.bits, s.group_size) for s in schemes.values()).most_common(1)[0][0]
    dynamic = {
        f"+:^{re.escape(name)}$": {"bits": scheme.bits, "group_size": scheme.group_size}
        for name, scheme in schemes.items()
        if (scheme.bits, scheme.group_size) != common
    }
    dynamic |= {
        f"-:^{re.escape(name)}$": {}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in schemes and not isinstance(module, PackedLinear)
        and any(name.rpartition(".")[0].startswith(packed.rpartition(".")[0]) for packed in schemes)
    }  # fmt: skip
    head = module_names(model).get(model.get_output_embeddings())
    return {
        "quant_method": "gptq",
        "bits": common[0],
        "group_size": common[1],
        "sym": all(scheme.symmetric for scheme in schemes.values()),
        "desc_act": any(scheme.desc_act for scheme in schemes.values()),
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": head in schemes,
        "dynamic": dynamic or None,
        "meta": {"quantizer": [f"hf_compress:{hf_compress.__version__}"]},
    }
