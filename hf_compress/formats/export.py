"""Write a compressed model for readers that do not know hf_compress."""

import copy
import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.files.whole import check_free, whole_folder
from hf_compress.formats.compressed_tensors_write import compressed_tensors
from hf_compress.formats.gemma import gemma_tensors
from hf_compress.formats.gptq import gptq_tensors
from hf_compress.model.unfinished import check_finished, check_loaded

RUNTIMES = ("gguf", "onnx", "openvino")
FORMATS = ("compressed-tensors", "gemma", "gptq", "plain", *RUNTIMES)


def export(model: PreTrainedModel, folder: str | Path, *, format: str,
           tokenizer: PreTrainedTokenizerBase | None = None, calibration: Iterable | None = None) -> Path:  # fmt: skip
    """Write `model` into an empty or new `folder` in a format of the ecosystem, with its `tokenizer` if one is given.

    `model` stays as it is. The folder is there when all of it is, and a kill leaves none.

    gptq                read by GPTQModel, vLLM and others: zero points minus one (v1) where all weights are symmetric,
                        else as they are (v2), since readers refuse asymmetric v1 files that others wrote
    compressed-tensors  pack-quantized, read by vLLM and Transformers with compressed-tensors
    gemma               Transformers' own format: no plugin needed; 2, 4 and 8 bit, symmetric, one scale per row
    plain               dequantized weights that any loader reads
    openvino, onnx      a graph that OpenVINO or ONNX Runtime runs without torch, Transformers or us, in a folder that
                        is complete: tokenizer, labels, a README with the lines that run it, hf_compress.json
    gguf                a file that llama.cpp runs

    The last three want the tokenizer (by default that of the folder which `model` came from), run what they wrote
    beside `model`, on 64 texts of `calibration` (texts, rows or batches) or random tokens, and keep nothing when both
    differ.

    Raises ValueError for a folder that holds something and, naming the module, for what the format cannot express,
    ImportError for a missing runtime, naming the extra that brings it, and RuntimeError, naming the layer, where the
    runtime gives other outputs.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    if format not in RUNTIMES and calibration is not None:
        raise ValueError(f"calibration is for {RUNTIMES}, not for {format!r}.")
    check_loaded(model, "export")
    check_finished(model, "export")
    folder = Path(folder)
    check_free(folder)
    if format in RUNTIMES:
        installed(format).write(model, folder, tokenizer=tokenizer, calibration=calibration)
        return folder
    with whole_folder(folder) as beside:
        write_weights(model, beside, format)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
    return folder


def write_weights(model: PreTrainedModel, folder: Path, format: str) -> None:
    """Config and tensors, in a format that loaders of Python read."""
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


def installed(format: str, module: str | None = None) -> ModuleType:
    """The module that writes for a runtime, or another that needs it. Raises ImportError that says what to install."""
    try:
        return import_module(module or f"hf_compress.formats.{format}")
    except ImportError as error:
        missing = error.name or ""
        if missing.startswith("transformers"):
            what = f"exporters, which Transformers has since 5.23; installed is {transformers.__version__}"
            raise ImportError(f"format={format!r} needs {what}. Install transformers>=5.23.") from error
        raise ImportError(
            f"format={format!r} needs {missing or error}: install it with `pip install 'hf_compress[{format}]'`."
        ) from error


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
