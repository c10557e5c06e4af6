"""GGUF, which llama.cpp runs: language models and embedders, evenly or unevenly pruned, packed or not, weights exact.

    llama   Llama, Mistral; the same numbers of heads and neurons in each layer, also of the other families
    qwen2   whole Qwen2 models
    bert    embedders, cut heads and neurons filled up with zeros, mean over tokens
    deci    numbers of its own for each layer, with Llama's mathematics: `llama` would take the first layer's for all

Tested with gguf 0.19.0; llama.cpp rounds inputs to 8 bit itself, so texts may differ where two tokens are near.
"""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.files.whole import check_free, whole_folder
from hf_compress.formats.runtimes import gguf_bert, gguf_llama
from hf_compress.formats.runtimes.folder import RECORD, tokenizer_beside, warn_of_other_versions
from hf_compress.formats.runtimes.gguf_blocks import Matrix
from hf_compress.model.record import read_record
from hf_compress.version import __version__

TESTED = {"gguf": "0.19.0"}
FILE = "model.gguf"
README = """# {name} for llama.cpp

```bash
{command}
```

or from Python, `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

{python}
```

`hf_compress.json` says what is inside. Its weights are those of the model that it was written from, bit for bit;
llama.cpp rounds what they are multiplied by to 8 bit.
"""
WRITE = {
    "command": 'llama-cli -m model.gguf -p "Once upon a time" -n 40',
    "python": 'model = Llama("model.gguf", n_ctx=2048)\n'
    'print(model("Once upon a time", max_tokens=40)["choices"][0]["text"])',
}
EMBED = {
    "command": 'llama-embedding -m model.gguf -p "A fine film."',
    "python": 'model = Llama("model.gguf", embedding=True)\nprint(model.embed("A fine film.", normalize=True))',
}


def write(model: PreTrainedModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None,
          calibration: Iterable | None) -> None:  # fmt: skip
    """Raises ValueError, naming the module, for what GGUF cannot say, before anything is written."""
    if calibration is not None:
        raise ValueError("calibration is for 'onnx' and 'openvino': of a GGUF file the weights are compared.")
    check_free(folder)
    warn_of_other_versions(TESTED)
    tokenizer = tokenizer or tokenizer_beside(model)
    family, shape = described(model, tokenizer)
    matrices = dict(family.named_matrices(model, shape))
    with whole_folder(folder) as beside:
        write_file(model, beside / FILE, family, shape, matrices, tokenizer)
        check(beside / FILE, matrices)
        tokenizer.save_pretrained(beside)
        text = README.format(name=type(model).__name__, **(EMBED if family is gguf_bert else WRITE))
        (beside / "README.md").write_text(text, encoding="utf-8")
        kinds = [matrix.kind.name for matrix in matrices.values()]
        contents = {
            "hf_compress": __version__,
            "format": "gguf",
            "model": type(model).__name__,
            "packages": {name: version(name) for name in (*TESTED, "torch")},
            "architecture": shape.arch,
            "tensors": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "record": read_record(model.config),
            "agreement": {"equal_weights": len(matrices)},
        }
        (beside / RECORD).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def described(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[ModuleType, Any]:
    """The family of `model` in llama.cpp and its shape there. Raises ValueError for what llama.cpp does not know."""
    if tokenizer is None:
        raise ValueError("A GGUF file holds its tokenizer: pass `tokenizer`.")
    family = gguf_bert if model.config.model_type == "bert" else gguf_llama
    shape = family.shape_of(model)
    family.check_tokenizer(tokenizer, model)
    return family, shape


def write_file(model: PreTrainedModel, file: Path, family: ModuleType, shape: object, matrices: dict[str, Matrix],
               tokenizer: PreTrainedTokenizerBase) -> None:  # fmt: skip
    writer = gguf.GGUFWriter(file, shape.arch)
    writer.add_type("model")
    writer.add_name(type(model).__name__)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_context_length(model.config.max_position_embeddings)
    family.add_shape(writer, model, shape)
    family.add_tokenizer(writer, tokenizer, model)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, matrix in matrices.items():
        writer.add_tensor(name, matrix.data(), raw_dtype=matrix.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(file: Path, matrices: dict[str, Matrix]) -> None:
    """Raise RuntimeError, naming the tensor, unless the file decodes to what was to be written, bit for bit."""
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, matrix in matrices.items():
        decoded = gguf.quants.dequantize(read[name].data, read[name].tensor_type)
        if not np.array_equal(decoded, matrix.decoded()):
            raise RuntimeError(f"{name} of {file.name} does not decode to the model's weight. Nothing was kept.")
