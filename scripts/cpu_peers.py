"""What other libraries make of a model for the CPU, for `benchmark_model_cpu.py`: those of them that are installed.

pip install bitsandbytes optimum-quanto torchao; GPTQModel wants optimum too
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, GPTQConfig, PreTrainedModel

import hf_compress as hfc

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
    yield "GPTQModel 4 bit", lambda: gptqmodel(load, folder)


def quanto(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, weights), exclude=["lm_head"])
    quanto.freeze(model)
    return model


def torchao(model: PreTrainedModel) -> PreTrainedModel:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def gptqmodel(load: Load, folder: Path) -> PreTrainedModel:
    """Opens a 4-bit checkpoint of ours; its integers do not matter here."""
    import gptqmodel  # noqa: F401  Transformers' own message is about optimum

    with tempfile.TemporaryDirectory() as exported:
        hfc.export(hfc.quantize(load(folder), 4), exported, format="gptq")
        return load(exported, dtype=torch.bfloat16, quantization_config=GPTQConfig(bits=4, backend="torch"))


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
