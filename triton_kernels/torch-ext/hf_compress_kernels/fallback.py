"""What a launcher does on a device whose shared memory is too small for a tile: a smaller one, then none."""

import logging
from typing import Callable, Dict, Sequence

from torch import Tensor
from triton.runtime.errors import OutOfResources

from .tuning import TileConfig

logger = logging.getLogger(__name__)

_too_large: Dict[tuple, int] = {}  # operator, sizes and device -> how many of its tiles did not fit there


def first_that_fits(
    what: tuple, configs: Sequence[TileConfig], launch: Callable[[TileConfig], Tensor]
) -> "Tensor | None":
    """What `launch` returns with the first of `configs` that the device has the memory for; None if none fits.

    `what` names the operator, its sizes and the device: which tiles do not fit is said once and remembered by it.
    """
    for number in range(_too_large.get(what, 0), len(configs)):
        try:
            return launch(configs[number])
        except OutOfResources as error:
            _too_large[what] = number + 1
            rest = configs[number + 1 :]
            logger.warning("%s: %s does not fit (%s). Using %s.", what, configs[number], error,
                           rest[0] if rest else "the reference, which is slower")  # fmt: skip
    return None
