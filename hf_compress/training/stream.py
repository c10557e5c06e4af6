"""Training on a stream: text without a length, read once as it comes, and gone on with where a checkpoint left it.

`Trainer` resumes by reading everything that was trained on once more. Here a checkpoint holds the stream's own
`state_dict`, as of the last batch that was trained on (a batch or more is read ahead), and only the rest is read.
"""

import io
import logging
from collections.abc import Iterator
from copy import copy, deepcopy
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from traceback import extract_tb
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_compress.model.calibration_data import is_stream

logger = logging.getLogger(__name__)

STREAM_FILE = "stream.pt"  # in a checkpoint


class Place(NamedTuple):
    """Where in a stream a training is: in which pass over it, after how many of its batches and examples.

    state  the stream's own, None where it has none or the pass has not begun
    """

    number: int = 0
    batches: int = 0
    examples: int = 0
    state: Any = None


class Stream(IterableDataset):
    """`source` for a data loader of `batch_size` examples over all processes, which begins at `place`.

    The places after the batches that were read and not yet `taken` are kept: one or two, however long the stream.
    """

    def __init__(self, source: IterableDataset, batch_size: int, place: Place | None = None):
        # A copy goes on: what is loaded into it must not move the beginning of the next training.
        self.source, self.batch_size = source if place is None else copy(source), batch_size
        self.is_stateful = keeps_place(source)
        self._next = place or Place()
        self._places: dict[int, Place] = {}
        self.number = self.taken_batches = 0

    def __iter__(self) -> Iterator:
        place, self._next = self._next, Place(self._next.number + 1)
        self.number, self.taken_batches, self._places = place.number, place.batches, {}
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(place.number)  # another order in each pass
        goes_on = self.is_stateful and place.state is not None
        rest = self._after(place.state) if goes_on else islice(self.source, place.examples, None)
        number = 0
        for number, example in enumerate(rest, 1):
            batches, rest = divmod(number, self.batch_size)
            if not rest:
                state = deepcopy(self.source.state_dict()) if self.is_stateful else None
                self._keep(Place(place.number, place.batches + batches, place.examples + number, state))
            yield example
        if not number:
            raise ValueError(
                f"The stream gave no example in pass {place.number + 1}, after the first {place.examples}: was "
                "everything filtered out, or can it be read only once?"
            )
        last = place.batches + -(-number // self.batch_size)
        self._places[last] = self._next  # what comes after the last batch is the next pass

    def _after(self, state: Any) -> Iterator:
        """The examples after `state`. Raises ValueError, naming what it lacks, for the state of another stream."""
        try:
            self.source.load_state_dict(deepcopy(state))
            examples = iter(self.source)
            first = list(islice(examples, 1))  # `datasets` reads a state when the first example is asked for
        except Exception as error:
            frames = extract_tb(error.__traceback__)
            is_of_state = any(frame.name.endswith("load_state_dict") for frame in frames)
            if not is_of_state and not frames[-1].filename.endswith("iterable_dataset.py"):  # of `datasets`
                raise
            raise ValueError(
                f"The place in {STREAM_FILE} of the checkpoint is one in another stream ({type(error).__name__}: "
                f"{error}). Give the stream that was trained on, or set ignore_data_skip=True to begin this one."
            ) from error
        return chain(first, examples)

    def _keep(self, place: Place) -> None:
        self._places = {n: kept for n, kept in self._places.items() if n >= self.taken_batches}
        self._places[place.batches] = place

    def taken(self, number: int) -> None:
        """Tell that `number` batches of this pass will be trained on before the next checkpoint."""
        self.taken_batches += number

    @property
    def place(self) -> Place:
        return self._places[self.taken_batches]


def keeps_place(source: IterableDataset) -> bool:
    """Whether a stream can say where it is and go on there, by `state_dict` and `load_state_dict`, to the example.

    Raises TypeError for a state of other things than tensors, numbers, texts, lists and dicts: a file that is read back
    must not run code. A shuffle buffer of `datasets` loses its examples, so such a stream is read again.
    """
    if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")) or _is_buffered(source):
        return False
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except UnpicklingError as error:
        raise TypeError(
            f"The state_dict of the stream ({type(source).__name__}) must hold tensors, numbers, texts, lists and "
            f"dicts alone, so that a checkpoint can hold it: {str(error).splitlines()[0]}"
        ) from error
    return True


def _is_buffered(source: IterableDataset) -> bool:
    found = [getattr(source, "_ex_iterable", None)]
    while found:
        part = found.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        inner = [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
        found += [one for one in inner if one is not None]
    return False


class StreamMixin(Trainer):
    """A `Trainer` whose training set may be a stream, resumed from its place.

    Not where worker processes or each rank by itself read the stream (`dataloader_num_workers`, `dispatch_batches`
    False), nor where it has a length: there `Trainer` reads again what was trained on.
    """

    _stream: Stream | None = None
    _resumed_from: str | None = None  # until its first batches are there

    @property
    def _has_stream(self) -> bool:
        reads_here = self.accelerator.num_processes == 1 or self.accelerator.dispatch_batches is not False
        return is_stream(self.train_dataset) and reads_here and not self.args.dataloader_num_workers

    def get_train_dataloader(self):
        if not self._has_stream:
            self._stream = None
            return super().get_train_dataloader()
        processes = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        place = None if self._resumed_from is None else _read_place(Path(self._resumed_from) / STREAM_FILE)
        source = self.train_dataset
        self._stream = self.train_dataset = Stream(source, self._train_batch_size * processes, place)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = source

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        file = Path(resume_from_checkpoint or "") / STREAM_FILE
        if not (resume_from_checkpoint and self._has_stream and file.is_file()) or self.args.ignore_data_skip:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if not keeps_place(self.train_dataset):
            logger.warning(
                "The stream has no state to go on from (no state_dict, or a shuffle buffer): its first %d examples are "
                "read again and passed over.", _read_place(file).examples,
            )  # fmt: skip
        self._resumed_from, self.args.ignore_data_skip = resume_from_checkpoint, True  # it is skipped here
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resumed_from, self.args.ignore_data_skip = None, False

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._stream is not None:
            self._stream.taken(len(samples))
            if self._resumed_from is not None and samples:
                self._load_rng_state(self._resumed_from)  # a data loader draws a number when it begins
                self._resumed_from = None
        return samples, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._stream is not None and self.is_in_train:
            steps = self.state.max_steps * self.args.gradient_accumulation_steps
            self.state.epoch = self._stream.number + self._stream.taken_batches / steps  # resumed or not
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._stream is not None and self.args.should_save:
            torch.save(self._stream.place._asdict(), Path(output_dir) / STREAM_FILE)


def _read_place(file: Path) -> Place:
    try:
        return Place(**torch.load(file, weights_only=True))
    except (UnpicklingError, TypeError) as error:
        raise ValueError(f"{file} is no place in a stream: {str(error).splitlines()[0]}") from error
