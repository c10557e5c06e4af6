"""What a test asks of the machine that it runs on."""

import os
import socket
import traceback
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, or kills with SIGKILL: not on Windows")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc: Linux alone has it")

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
         "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"}  # fmt: skip


def ranks(job, number: int) -> None:
    """Runs `job` in `number` forks that find each other through gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(number):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number,
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
                if number > 1:
                    os.environ.update({name: str(value) for name, value in environment.items()})
                    AcceleratorState._reset_state(reset_partial_state=True)  # it was looked up when there was one
                job(rank)
                status = 0
            except BaseException:  # told by the status; the test shows the text
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * number


def long_but(names, *quick: str) -> list:
    """Parameters that are all for `make test-long`, but a few."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.long) for name in names]


def share_weights(layer: str = "BertLayer", **environment: str) -> None:
    """In a fork: FSDP2, as `accelerate launch` sets it up, a group for each `layer`, with what else is said.

    Accelerate shards models on accelerators only, so here it takes the CPU for one.
    """
    os.environ.update({**FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": layer, **environment})
    make = AcceleratorState.__init__

    def make_for_accelerator(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = make_for_accelerator
