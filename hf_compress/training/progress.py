"""What a person sees while something runs: a bar that says how long it will take, and goes when it is done.

Where nobody watches, in a file or a pipe, there are lines instead of a bar.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from hf_compress.training.ranks import is_main

_OURS_ALONE: ContextVar[bool] = ContextVar("ours_alone", default=False)  # whether bars of libraries are hidden


def progress_bar(rows: Iterable | None = None, *, desc: str, disable: bool = False, **options) -> tqdm:
    """A bar over `rows`, or over `total`; hidden where transformers' bars are, unless these alone were hidden here."""
    is_wanted = _OURS_ALONE.get() or transformers_logging.is_progress_bar_enabled()
    hide = True if disable or not (is_main() and is_wanted) else None  # None: where no terminal is
    return tqdm(rows, desc=desc, disable=hide, leave=False, dynamic_ncols=True, **options)


@contextmanager
def our_bars_alone() -> Iterator[None]:
    """Without transformers' bars while open, those of loading and saving each model; ours stay as they were."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    ours = _OURS_ALONE.set(_OURS_ALONE.get() or was_enabled)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        _OURS_ALONE.reset(ours)
        if was_enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet(*, enabled: bool = True) -> Iterator[None]:
    """Without what libraries tell and a user cannot act on: their warnings, their bars, their reports of loading."""
    if not enabled:
        yield
        return
    from datasets.utils import logging as datasets_logging  # heavy, and measuring a model needs none of it

    level, shows_data = transformers_logging.get_verbosity(), datasets_logging.is_progress_bar_enabled()
    loggers = {name: logging.getLogger(name) for name in ("torch", "accelerate", "datasets", "huggingface_hub")}
    levels = {name: logger.level for name, logger in loggers.items()}
    transformers_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    for library in loggers.values():
        library.setLevel(logging.ERROR)
    try:
        with our_bars_alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, library in loggers.items():
            library.setLevel(levels[name])
        if shows_data:
            datasets_logging.enable_progress_bar()
        transformers_logging.set_verbosity(level)
