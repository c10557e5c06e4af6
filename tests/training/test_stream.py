"""A stream is read once; a training that stopped in the middle goes on there, with the same losses."""

import itertools

import pytest
import torch
from datasets import interleave_datasets
from distillation.data import rows
from helpers import tiny_model
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import default_data_collator
from trust.trainers import assert_same, build, data_of, run

import hf_compress as hfc
from hf_compress.model.calibration_data import MOST_ROWS, calibration_batches, first_batches
from hf_compress.training.resume import find_fault
from hf_compress.training.stream import STREAM_FILE, Place, Stream, keeps_place

TRAINERS = ("DistillationTrainer", "HeadPruningTrainer", "QBertTrainer", "WordLevelTrainer")


class Rows(IterableDataset):
    """Rows of a dataset one after the other, which counts what was read of it."""

    def __init__(self, data):
        self.data, self.numbers = data, []  # of the rows that were read

    @property
    def read(self):
        return len(self.numbers)

    def __iter__(self):
        for number, row in enumerate(self.data):
            self.numbers.append(number)
            yield row


class Stateful(Rows):
    """The same with a place in it."""

    def __init__(self, data):
        super().__init__(data)
        self.place = self.begin = 0

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for row in range(begin, len(self.data)):
            self.place = row + 1
            self.numbers.append(row)
            yield self.data[row]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.begin = self.place = state["place"]


def mapped(data):
    def backwards(rows):
        return {"input_ids": [ids[::-1] for ids in rows["input_ids"]]}

    return data.to_iterable_dataset(num_shards=3).map(backwards, batched=True, batch_size=3)


STREAMS = {
    "of-torch": Stateful,
    "of-datasets": mapped,
    "interleaved": lambda data: interleave_datasets([mapped(data), mapped(data)], [0.6, 0.4], seed=0),
    "without-state": Rows,
    "shuffled": lambda data: data.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=7),
}


@pytest.mark.parametrize(("kind", "name"), [*((kind, "DistillationTrainer") for kind in STREAMS),
                                            *(("of-datasets", name) for name in TRAINERS[1:])])  # fmt: skip
def test_a_training_that_stopped_in_the_middle_goes_on_there(kind, name, tmp_path, caplog):
    """20 rows in batches of 4, two a step: the third step ends the second pass's first batch."""
    options = dict(save_strategy="steps", save_steps=2, max_steps=6, gradient_accumulation_steps=2)

    def trained(folder, resume=None):
        extra = {"train_dataset": STREAMS[kind](data_of(name, 20))}
        return run(name, tmp_path / folder, resume, extra=extra, **options)

    whole = trained("whole")
    for step in (2, 4):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert (checkpoint / STREAM_FILE).is_file() and find_fault(checkpoint) is None
        assert_same(trained(f"resumed-{step}", str(checkpoint)), whole)
    assert ("are read again and passed over" in caplog.text) == (kind in ("without-state", "shuffled"))


@pytest.mark.parametrize(("mine", "other"), [("of-torch", "of-datasets"), ("of-datasets", "of-torch"),
                                             ("interleaved", "of-datasets")])  # fmt: skip
def test_a_place_in_another_stream_is_told(mine, other):
    stream = Stream(STREAMS[mine](rows(8)), 2)
    assert len([*itertools.islice(stream, 3)]) == 3
    there = Stream(STREAMS[other](rows(8)), 2, stream._places[1])
    with pytest.raises(ValueError, match="one in another stream .* Give the stream that was trained on"):
        next(iter(there))


def test_an_error_of_the_stream_itself_stays_its_own():
    class Broken(Stateful):
        def __iter__(self):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        next(iter(Stream(Broken(rows(8)), 2, Place(state={"place": 1}))))


def test_only_the_rest_is_read(tmp_path):
    data = Stateful(data_of("DistillationTrainer", 24))
    options = dict(max_steps=5, save_strategy="steps", save_steps=3)
    build("DistillationTrainer", tmp_path / "one", extra={"train_dataset": data}, **options).train()
    assert data.numbers == list(range(24))  # a batch ahead of five
    data.numbers.clear()
    trainer = build("DistillationTrainer", tmp_path / "two", extra={"train_dataset": data}, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert data.numbers == list(range(12, 24)) and trainer.args.ignore_data_skip is False
    data.numbers.clear()
    build("DistillationTrainer", tmp_path / "three", extra={"train_dataset": data}, **options).train()
    assert data.numbers == list(range(24))  # another training begins at the beginning


def test_nothing_is_read_before_training(tmp_path):
    cache = tmp_path / "cache"
    hfc.cache_teacher(tiny_model("bert", seed=3), data_of("DistillationTrainer", 24), cache)
    for name in ("DistillationTrainer", "HeadPruningTrainer"):
        data = Rows(data_of(name, 24))
        extra = {"train_dataset": data}
        if name == "DistillationTrainer":
            extra |= {"eval_dataset": None}
        build(name, tmp_path, extra=extra)
        assert data.read == 0


def endless(data):
    return Stateful(list(itertools.islice(itertools.cycle(data), 1000)))


def test_the_places_kept_do_not_grow():
    stream = Stream(endless(rows(8)), 4)
    for number, _ in enumerate(stream, 1):
        if number % 4 == 0 and number > 4:
            stream.taken(1)
            assert stream.place == Place(0, number // 4 - 1, number - 4, {"place": number - 4})
            assert len(stream._places) <= 3
    assert stream.number == 0 and number == 1000
    stream.taken(1)
    assert stream.place == Place(1)  # what comes after the end is the next pass


def test_a_stream_that_gives_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match="gave no example in pass 1"):
        build("DistillationTrainer", tmp_path, extra={"train_dataset": Rows([])}).train()
    once = iter(rows(20))

    class Once(IterableDataset):
        def __iter__(self):
            return once

    with pytest.raises(ValueError, match="gave no example in pass 2, .* can it be read only once"):
        build("DistillationTrainer", tmp_path, extra={"train_dataset": Once()}).train()


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Odd(Stateful):
        def state_dict(self):
            return {"place": get_worker_info}

    with pytest.raises(TypeError, match=r"state_dict of the stream \(Odd\) must hold tensors, numbers, texts"):
        build("DistillationTrainer", tmp_path, extra={"train_dataset": Odd(rows(8))}).train()
    assert keeps_place(Stateful(rows(2))) and not keeps_place(Rows(rows(2)))


def test_calibration_takes_the_first_rows_of_a_stream(caplog):
    """A number that is said: such a stream may have no end."""
    model, data = tiny_model("llama"), rows(MOST_ROWS + 20, kind="clm")
    expected = calibration_batches(data.select(range(MOST_ROWS)), model)
    for stream in (Stateful(list(data)), data.to_iterable_dataset()):
        caplog.clear()
        found = calibration_batches(stream, model)
        assert len(found) == len(expected) and f"first {MOST_ROWS} rows" in caplog.text
        for mine, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    stream = Stateful(list(data))
    batches = list(first_batches(DataLoader(stream, batch_size=30, collate_fn=default_data_collator)))
    assert len(batches) == 9 and stream.read == 270
    assert len(list(first_batches(DataLoader(data, batch_size=30, collate_fn=default_data_collator)))) == 10
    assert len(list(first_batches([{"a": torch.ones(1)}] * 300))) == 300


def test_quantization_and_importance_of_a_stream_are_those_of_its_rows():
    data = rows(8)
    stream = data.to_iterable_dataset()

    def loader(source):
        return DataLoader(source, batch_size=4, collate_fn=default_data_collator)

    packed = [
        hfc.quantize(tiny_model("bert"), 4, method="gptq", calibration=source, group_size=16).state_dict()
        for source in (data, stream)
    ]
    assert all(torch.equal(value, packed[1][name]) for name, value in packed[0].items())
    model = tiny_model("bert")
    for measure in (hfc.head_importance, hfc.layer_importance, hfc.neuron_importance):
        assert torch.equal(measure(model, loader(stream)), measure(model, loader(data))), measure.__name__
    for method in ("fisher", "trace"):
        found = [hfc.hessian_sensitivity(model, loader(source), method=method) for source in (data, stream)]
        assert found[0] == found[1]
