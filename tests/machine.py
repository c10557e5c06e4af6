"""What a test asks of the machine that it runs on."""

import os
import socket
import traceback
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, or kills with SIGKILL: not on Windows")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc: Linux alone has it")


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
