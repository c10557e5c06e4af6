"""GGUF, which llama.cpp runs: Llama, Mistral and Qwen2, evenly or unevenly pruned, packed or not, weights exact.

    llama   the same numbers of heads and neurons in each layer, also of the other families
    qwen2   whole Qwen2 models
    deci    numbers of its own for each layer, with Llama's mathematics: `llama` would take the first layer's for all

Tested with gguf 0.19.0; llama.cpp rounds inputs to 8 bit itself, so texts may differ where two tokens are near.
"""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.formats.runtimes.folder import tokenizer_beside, warn_of_other_versions
from hf_compress.formats.runtimes.gguf_blocks import Matrix
from hf_compress.formats.runtimes.gguf_tensors import Shape, named_matrices, shape_of
from hf_compress.formats.runtimes.gguf_tokenizer import add_tokenizer, pre_tokenizer
from hf_compress.formats.runtimes.whole_folder import RECORD, check_free, whole_folder
from hf_compress.model.record import read_record
from hf_compress.version import __version__

TESTED = {"gguf": "0.19.0"}
FILE = "model.gguf"
README = """# {name} for llama.cpp

```bash
llama-cli -m model.gguf -p "Once upon a time" -n 40
```

or from Python, `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx=2048)
print(model("Once upon a time", max_tokens=40)["choices"][0]["text"])
```

`hf_compress.json` says what is inside. Its weights are those of the model that it was written from, bit for bit;
llama.cpp rounds what they are multiplied by to 8 bit.
"""


def write(model: PreTrainedModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None,
          calibration: Iterable | None) -> None:  # fmt: skip
    """Raises ValueError, naming the module, for what GGUF cannot say, before anything is written."""
    if calibration is not None:
        raise ValueError("calibration is for 'onnx' and 'openvino': of a GGUF file the weights are compared.")
    check_free(folder)
    warn_of_other_versions(TESTED)
    tokenizer = tokenizer or tokenizer_beside(model)
    if tokenizer is None:
        raise ValueError("A GGUF file holds its tokenizer: pass `tokenizer`.")
    shape = shape_of(model)
    pre_tokenizer(tokenizer, model.config.vocab_size)
    matrices = dict(named_matrices(model, shape))
    with whole_folder(folder) as beside:
        write_file(model, beside / FILE, shape, matrices, tokenizer)
        check(beside / FILE, matrices)
        tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(README.format(name=type(model).__name__), encoding="utf-8")
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


def write_file(model: PreTrainedModel, file: Path, shape: Shape, matrices: dict[str, Matrix],
               tokenizer: PreTrainedTokenizerBase) -> None:  # fmt: skip
    config, writer = model.config, gguf.GGUFWriter(file, shape.arch)
    writer.add_type("model")
    writer.add_name(Path(model.name_or_path or type(model).__name__).name)
    writer.add_block_count(len(shape.heads))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_context_length(config.max_position_embeddings)
    for add, numbers in (
        (writer.add_feed_forward_length, shape.neurons),
        (writer.add_head_count, shape.heads),
        (writer.add_head_count_kv, shape.key_value_heads),
    ):
        add(numbers if shape.is_uneven else numbers[0])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, tokenizer, config.vocab_size)
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
