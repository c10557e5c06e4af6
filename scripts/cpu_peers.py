"""What other libraries make of a model for the CPU, for `benchmark_model_cpu.py`: those of them that are installed.

pip install bitsandbytes optimum-quanto torchao
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

Load = Callable[..., PreTrainedModel]  # a folder and options of `from_pretrained`


def classifiers(load: Load, folder: Path) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Name, and what makes the 8-bit model in bfloat16."""
    yield (
        "bitsandbytes int8",
        lambda: load(folder, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_8bit=True)),
    )
    yield "optimum-quanto int8", lambda: quanto(load(folder, dtype=torch.bfloat16), "qint8")
    yield "torchao int8, dynamic", lambda: torchao(load(folder, dtype=torch.bfloat16))


def decoders(load: Load, folder: Path) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Name, and what makes the 4-bit model in bfloat16; the head stays as it is."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    yield "bitsandbytes nf4", lambda: load(folder, dtype=torch.bfloat16, quantization_config=nf4)
    yield "optimum-quanto int4", lambda: quanto(load(folder, dtype=torch.bfloat16), "qint4")


def quanto(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, weights), exclude=["lm_head"])
    quanto.freeze(model)
    return model


def torchao(model: PreTrainedModel) -> PreTrainedModel:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def installed(kind: Callable[[Load, Path], Iterator], load: Load, folder: Path) -> dict[str, PreTrainedModel]:
    """The models that can be made here; why another cannot goes to stderr."""
    models = {}
    for name, make in kind(load, folder):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout carries the measurements
                models[name] = make().eval()
        except Exception as error:  # any library's own trouble must not stop the others
            print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return models
