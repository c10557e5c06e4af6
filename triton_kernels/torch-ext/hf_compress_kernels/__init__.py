"""Low-bit and block-sparse operators for compressed transformers: Triton on GPUs, PyTorch on CPUs."""

from . import layers
from .blocks import BlockSparseWeight, bsr_from_dense, bsr_to_dense, bsr_weight
from .bsr import bsr_linear
from .gptq import gptq_quantize_block
from .int8 import w8a8_linear
from .kl import kl_from_logits
from .packing import pack_gptq, pack_rows, pack_zeros, unpack_gptq, unpack_rows, unpack_zeros, words_per_row
from .planes import PackedWeight
from .wna16 import gptq_repack, wna16_dequant, wna16_linear, wna16_pack, wna16_unpack

__all__ = [
    "BlockSparseWeight",
    "PackedWeight",
    "bsr_from_dense",
    "bsr_linear",
    "bsr_to_dense",
    "bsr_weight",
    "gptq_quantize_block",
    "gptq_repack",
    "kl_from_logits",
    "layers",
    "pack_gptq",
    "pack_rows",
    "pack_zeros",
    "unpack_gptq",
    "unpack_rows",
    "unpack_zeros",
    "w8a8_linear",
    "wna16_dequant",
    "wna16_linear",
    "wna16_pack",
    "wna16_unpack",
    "words_per_row",
]
