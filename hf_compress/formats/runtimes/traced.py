"""What transformers' exporters are given: the model with ordinary float32 weights, and how to find those again.

The exporters refuse packed layers. So a dequantized copy is traced, and in the graph each weight that came from a
packed layer is found by its values and replaced by the integers.
"""

import copy
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.exporters import DynamoConfig, ExportedModel
from transformers.exporters.base import HfExporter
from transformers.exporters.utils import decompose_for_generation
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.bits import packed_modules, unpack
from hf_compress.formats.runtimes.agreement import random_batch, reason
from hf_compress.formats.runtimes.readme import decodes
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.model.inputs import forward_names

SAMPLE = 2, 16  # rows and tokens: a size of 1 would be taken for a constant


@dataclass(frozen=True)
class Traced:
    model: PreTrainedModel  # float32, of ordinary modules
    names: dict[bytes, tuple[str, bool]]  # by `key`: the packed module, and whether its weight (N, K) is transposed

    def find(self, array: np.ndarray) -> tuple[str, bool] | None:
        return self.names.get(key(array)) if array.ndim == 2 and array.dtype == np.float32 else None


def key(array: np.ndarray) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16)
    return repr(array.shape).encode() + digest.digest()


class BiasLinear(nn.Linear):
    """A linear map without inputs, of a layer that lost all its heads or neurons: its bias, wherever it is asked.

    As a product over nothing OpenVINO gives whatever its memory holds.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        return bias.expand(*x.shape[:-1], self.out_features)


@torch.no_grad()
def traced(model: PreTrainedModel) -> Traced:
    """A copy of `model` without packed and block-sparse layers, and where their weights are."""
    plain = copy.deepcopy(model)
    names = [name for name, _ in packed_modules(plain)]
    unpack(plain, torch.float32)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BlockSparseLinear):
            plain.set_submodule(name, _dense(module))
        elif type(module) is nn.Linear and module.in_features == 0:
            module.__class__ = BiasLinear
    plain.hf_quantizer, plain.is_quantized = None, False
    plain.config.__dict__.pop("quantization_config", None)
    plain = plain.float().cpu().eval()
    found: dict[bytes, tuple[str, bool]] = {}
    for name in names:
        module = plain.get_submodule(name)
        weight = module.weight.data = module.weight.data.contiguous()
        while key(weight.numpy()) in found:  # two layers with the same weight are told apart by one value's last bits
            weight.view(torch.int32).view(-1)[0] += 1
        is_transposed = isinstance(module, Conv1D)
        found[key(weight.numpy())] = name, is_transposed
        found.setdefault(key(weight.numpy().T), (name, not is_transposed))
    return Traced(plain, found)


def graph(
    exporter: HfExporter, plain: PreTrainedModel, inputs: list[str] | None, config: DynamoConfig
) -> ExportedModel:
    """What `exporter` makes of `plain`. Raises ValueError, with the exporter's own reason, where it makes nothing."""
    try:
        return exporter.export(plain, sample_inputs(plain, inputs), config)
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"Transformers' exporter makes no {config.export_format} graph of {type(plain).__name__}: "
            f"{reason(error)} Nothing was written. Export as 'plain'."
        ) from error


def sample_inputs(model: PreTrainedModel, inputs: list[str] | None) -> dict:
    """What `model` is traced with: random tokens, a segment for each where `inputs` (a tokenizer's) names them.

    Decoders get a cache with some tokens in it, so that one graph reads a prompt (over an empty cache) and goes on.
    """
    rows, tokens = SAMPLE
    batch = {k: v[:rows] for k, v in random_batch(model, tokens).items()}
    if decodes(model):
        if "attention_mask" in batch:
            batch["attention_mask"][0, 0] = 0  # one of ones alone is left out, and the graph would know no padding
        if getattr(model.config.get_text_config(), "sliding_window", None):
            # one that drops tokens is shorter than the mask, and its window would be an input; the mask has it as well
            batch["past_key_values"] = DynamicCache()
        model = copy.copy(model)
        # the model's own may be without a cache, as training leaves it, with one of a fixed size, or with several beams
        model.generation_config = GenerationConfig(use_cache=True)
        return decompose_for_generation(model, batch, multi_token_decode=True)["decode"][1]
    has_segments = getattr(model.config, "type_vocab_size", 0) > 1 if inputs is None else "token_type_ids" in inputs
    if has_segments and "token_type_ids" in forward_names(model):
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def _dense(module: BlockSparseLinear) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight, dense.bias = nn.Parameter(module.dense_weight()), module.bias
    return dense
