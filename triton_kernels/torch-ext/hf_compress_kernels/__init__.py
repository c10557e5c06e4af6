"""Low-bit and block-sparse operators for compressed transformers: Triton on GPUs, PyTorch on CPUs."""

from .dispatch import register_cpu_engine, unregister_cpu_engine
from .int8 import packed_embedding, w8a8_linear
from .packing import pack_gptq, pack_rows, pack_zeros, unpack_gptq, unpack_rows, unpack_zeros, words_per_row
from .planes import PackedWeight
from .wna16 import gptq_repack, wna16_dequant, wna16_linear, wna16_pack, wna16_unpack

__all__ = [
    "PackedWeight",
    "gptq_repack",
    "pack_gptq",
    "pack_rows",
    "pack_zeros",
    "packed_embedding",
    "register_cpu_engine",
    "unpack_gptq",
    "unpack_rows",
    "unpack_zeros",
    "unregister_cpu_engine",
    "w8a8_linear",
    "wna16_dequant",
    "wna16_linear",
    "wna16_pack",
    "wna16_unpack",
    "words_per_row",
]
