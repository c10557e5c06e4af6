"""Which of the processes that `accelerate launch` started this is, and that all of them do the same.

Nothing heavy is imported where there is one alone.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

PATIENCE = 3.0  # seconds in which rank 0, where it fails too, tells of it in place of another


def is_main() -> bool:
    """Whether this is the process that writes and tells: the only one, or the first."""
    return int(os.environ.get("RANK", 0)) == 0


def are_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def wait_for_all() -> None:
    """Wait until all processes have come here; with one alone there is nothing to wait for."""
    if are_several():
        from accelerate import PartialState  # heavy, and only needed by several

        PartialState().wait_for_everyone()


def of_all(value: Any) -> list[Any]:
    """The `value` of each rank, in their order. All have to ask."""
    import torch.distributed as dist  # heavy, and only needed by several

    if are_several():
        from accelerate import PartialState

        PartialState()  # which brings the ranks together
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_same(facts: Mapping[str, object], what: str) -> None:
    """Raise ValueError, in the same words on all ranks, where `facts` (name -> value) of one are not those of rank 0.

    All ranks have to ask. `what` begins the sentence.
    """
    first, *others = of_all(dict(facts))
    for rank, theirs in enumerate(others, 1):
        for name in {**first, **theirs}:
            if theirs.get(name) != first.get(name):
                raise ValueError(
                    f"{what} has to be begun alike by all processes, but {name} of process {rank} is "
                    f"{theirs.get(name)}, and of process 0 {first.get(name)}. Give all of them the same."
                )


@contextmanager
def failing_together() -> Iterator[None]:
    """What one rank raises while this is open ends all of them. Nothing that is done in it may wait for other ranks."""
    error = None
    try:
        yield
    except Exception as one:
        error = one
    told = of_all(None if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise ValueError(f"Process {rank} failed: {text}")


def may_tell() -> bool:
    """Whether this process, which failed, says so: of several one does, rank 0 where it fails as well."""
    store = _common_store() if are_several() else None
    if store is None:
        return is_main()
    import torch.distributed as dist

    key, me = f"hf_compress/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", os.environ.get("RANK", "0")
    try:
        end = time.monotonic() + (0 if is_main() else PATIENCE)
        while time.monotonic() < end and not store.check([key]):
            time.sleep(0.05)
        return store.compare_set(key, "", me) == me.encode()
    except dist.DistError:  # rank 0, which kept the store, has told and is gone
        return False


def _common_store():
    """What all processes of a launch can write to, and whether or not they have found each other; None without."""
    import torch.distributed as dist

    if not dist.is_available():
        return None
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=PATIENCE))
