"""What transformers' exporters are given: the model with ordinary float32 weights, and how to find those again.

The exporters refuse packed layers. So a dequantized copy is traced, and in the graph each weight that came from a
packed layer is found by its values and replaced by the integers.
"""

import copy
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.exporters.utils import decompose_for_generation
from transformers.pytorch_utils import Conv1D

from hf_compress.checkpoint.bits import packed_modules, unpack
from hf_compress.layers.block_sparse import BlockSparseLinear
from hf_compress.model.inputs import example_batch

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


@torch.no_grad()
def traced(model: PreTrainedModel) -> Traced:
    """A copy of `model` without packed and block-sparse layers, and where their weights are."""
    plain = copy.deepcopy(model)
    names = [name for name, _ in packed_modules(plain)]
    unpack(plain, torch.float32)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BlockSparseLinear):
            plain.set_submodule(name, _dense(module))
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


def sample_inputs(model: PreTrainedModel, inputs: list[str] | None) -> dict:
    """What `model` is traced with: random tokens, a segment for each where `inputs` (a tokenizer's) names them.

    Decoders get a cache with some tokens in it, so that one graph reads a prompt (over an empty cache) and goes on.
    """
    rows, tokens = SAMPLE
    batch = {k: v[:rows] for k, v in example_batch(model, sequence_length=tokens).items()}
    if model.can_generate() and not model.config.is_encoder_decoder:
        return decompose_for_generation(model, batch, multi_token_decode=True)["decode"][1]
    has_segments = getattr(model.config, "type_vocab_size", 0) > 1 if inputs is None else "token_type_ids" in inputs
    if has_segments:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def _dense(module: BlockSparseLinear) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight, dense.bias = nn.Parameter(module.dense_weight()), module.bias
    return dense
