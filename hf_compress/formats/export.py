"""Write a compressed model for readers that do not know hf_compress."""

import copy
import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.formats.compressed_tensors.write import compressed_tensors
from hf_compress.formats.gemma import gemma_tensors
from hf_compress.formats.gptq import gptq_tensors

FORMATS = ("compressed-tensors", "gemma", "gptq", "plain")


def export(model: PreTrainedModel, folder: str | Path, *, format: str) -> Path:
    """Write `model` into `folder` in a format of the ecosystem. `model` stays as it is.

    gptq                read by GPTQModel, vLLM and others: zero points minus one (v1) where all weights are symmetric,
                        else as they are (v2), since readers refuse asymmetric v1 files that others wrote
    compressed-tensors  pack-quantized, read by vLLM and Transformers with compressed-tensors
    gemma               Transformers' own format: no plugin needed; 2, 4 and 8 bit, symmetric, one scale per row
    plain               dequantized weights that any loader reads

    Raises ValueError, naming the module, for what the format cannot express.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    folder = Path(folder)
    if format == "plain":
        plain = copy.deepcopy(model)
        if getattr(plain, "hf_quantizer", None) is not None:
            plain = plain.dequantize()
        plain.save_pretrained(folder)
    elif format == "gptq":
        state, settings = gptq_tensors(model)
        save_as(model, folder, state, settings)
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    elif format == "compressed-tensors":
        save_as(model, folder, *compressed_tensors(model))
    else:
        save_as(model, folder, *gemma_tensors(model))
    return folder


def save_as(model: PreTrainedModel, folder: Path, state: dict[str, Tensor], quantization_config: dict) -> None:
    """`save_pretrained` with another state dict and record: the model's own are put back afterwards."""
    own_config, quantizer = model.config, model.__dict__.get("hf_quantizer")
    model.config = copy.deepcopy(own_config)
    model.config.quantization_config = quantization_config
    model.hf_quantizer = None  # it would write its own tensors instead of `state`
    try:
        model.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in state.items()})
    finally:
        model.config = own_config
        model.hf_quantizer = quantizer
