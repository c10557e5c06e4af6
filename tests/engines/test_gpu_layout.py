"""What no kernel takes is said once, not in a line of a log for each layer."""

import logging

import torch
from transformers.utils import logging as transformers_logging

from hf_compress.engines import gpu
from hf_compress.layers.packed_linear import PackedLinear
from hf_compress.layers.scheme import WeightScheme


def test_groups_of_unequal_size_are_warned_of_once():
    """31 of the first group, 33 of the second: no kernel walks them, and each call would dequantize the weight."""
    layer = PackedLinear(64, 32, WeightScheme(4, 32, desc_act=True), dtype=torch.float16)
    layer.g_idx = torch.tensor([0] * 31 + [1] * 33, dtype=torch.int32)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = transformers_logging.get_logger("hf_compress.engines.gpu")
    logger.addHandler(handler)
    try:
        for _ in range(3):
            assert gpu.make_run(layer.stored(), torch.float16, int8=False) is None
    finally:
        logger.removeHandler(handler)
    assert len(lines) == 1 and "dequantized in each call: g_idx must put 32 columns in each group" in lines[0]
