"""FSDP2 on CPUs, which Accelerate itself leaves to accelerators: for tests, and to measure on a machine without one."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
         "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"}  # fmt: skip


def share_weights(layer: str = "BertLayer", **environment: str) -> None:
    """In a process of several: FSDP2 as `accelerate launch` sets it up, a group for each `layer`, with other settings.

    Accelerate takes the CPU for an accelerator from then on.
    """
    os.environ.update({**FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": layer, **environment})
    make = AcceleratorState.__init__

    def make_for_accelerator(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = make_for_accelerator
