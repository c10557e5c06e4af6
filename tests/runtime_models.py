"""Small models of every kind that leaves for a runtime, and what reads them there."""

import re
from pathlib import Path

import torch
from helpers import tiny_batch, tiny_model
from recipe_run import WORDS
from transformers import BertTokenizerFast, PreTrainedModel

import hf_compress as hfc

SMALL = dict(num_hidden_layers=2, intermediate_size=64)
ROWS = dict(bits=8, symmetric=True, group_size=-1)


def tiny_tokenizer() -> BertTokenizerFast:
    vocabulary = [*WORDS, *(f"word{i}" for i in range(64 - len(WORDS)))]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)


def with_spread(model: PreTrainedModel) -> PreTrainedModel:
    """Weights ten times as large as fresh ones: outputs that depend on the text."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(10)
    return model


def trained_ranges(model: PreTrainedModel) -> PreTrainedModel:
    """8-bit rows with ranges as quantization-aware training leaves them."""
    hfc.prepare_qat(model, bits=8, symmetric=True).train()
    for seed in range(3):
        model(**tiny_batch(model, batch=8, length=20, seed=seed))
    return hfc.pack_qat(model.eval())


def every_scheme() -> PreTrainedModel:
    """A classifier whose linear maps are each stored in another way."""
    model = with_spread(tiny_model("bert", **SMALL))
    data = [tiny_batch(model, batch=8, length=20, seed=seed) for seed in range(2)]
    layer = "bert.encoder.layer.{}"
    attention = layer + ".attention.self.{}"
    first = {attention.format(0, part): bits for part, bits in zip(("query", "key", "value"), (2, 3, 4), strict=True)}
    options = dict(method="gptq", desc_act=True, group_size=16, calibration=data)
    return hfc.quantize(model, first | {layer.format(1) + ".output.dense": 8}, **options)


def readme_code(folder: Path) -> str:
    """The Python lines of the folder's README."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]


def run_readme(folder: Path, monkeypatch) -> dict:
    """What these lines leave in their variables."""
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(readme_code(folder), scope)
    return scope
