"""Which of the processes that `accelerate launch` started this is, without importing anything heavy."""

import os


def is_main() -> bool:
    """Whether this is the process that writes and tells: the only one, or the first."""
    return int(os.environ.get("RANK", 0)) == 0


def wait_for_all() -> None:
    """Wait until all processes have come here; with one alone there is nothing to wait for."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState  # heavy, and only needed by several

        PartialState().wait_for_everyone()
