"""Processes that were not begun alike, or of which one fails: one sentence, and all of them end."""

from contextlib import redirect_stderr
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from checks.cpu_fsdp import share_weights
from distillation.data import rows
from helpers import tiny_model
from machine import needs_fork, ranks
from recipe_run import reviews, tiny_folder
from torch.utils.data import Dataset

import hf_compress as hfc
from hf_compress.commands import main
from hf_compress.training import checks
from hf_compress.training.checks import data_fact, weights_fact
from hf_compress.training.ranks import check_same, failing_together


def raised(work) -> str | None:
    try:
        work()
    except Exception as error:  # which it is, is the question
        return f"{type(error).__name__}: {error}"
    return None


def of_both(text: str | None) -> list:
    found = [None, None]
    dist.all_gather_object(found, text)
    return found


def assert_refused(work, *words: str) -> None:
    """Both ranks raise the same ValueError, which names process 1 and `words`."""
    mine, theirs = of_both(raised(work))
    assert mine == theirs and mine.startswith("ValueError: "), (mine, theirs)
    assert all(word in mine for word in ("process 1", *words)), mine


def bert(seed: int, num_hidden_layers: int = 1):
    return tiny_model("bert", seed=seed, num_hidden_layers=num_hidden_layers)


def trainer_of(folder, settings=None, **given):
    args = hfc.DistillationConfig(str(folder), use_cpu=True, max_steps=1, report_to="none", save_strategy="no",
                                  disable_tqdm=True, **(settings or {}))  # fmt: skip
    given = {"model": bert(0), "teacher_model": bert(1), "train_dataset": rows(24), **given}
    return hfc.DistillationTrainer(args=args, **given)


@needs_fork
def test_what_one_process_has_otherwise_is_named_by_all(tmp_path):
    def job(rank):
        def training(settings=None, **given):
            return trainer_of(tmp_path, settings, **given).train

        assert_refused(training(train_dataset=rows(24 + 8 * rank)), "train_dataset", "32 examples", "24 examples")
        assert_refused(training(train_dataset=rows(24, seed=rank)), "train_dataset of process 1 is 24 examples")
        assert_refused(training(train_dataset=list(rows(24, seed=rank))), "train_dataset")
        assert_refused(training(eval_dataset={"a": rows(8), "b": rows(8 + rank)}), "eval_dataset", "b: 9 examples")
        assert_refused(training({"temperature": 2.0 + rank}), "temperature of process 1 is 3.0, and of process 0 2.0")
        assert_refused(training({"gradient_accumulation_steps": 1 + rank}), "gradient_accumulation_steps")
        assert_refused(training(model=bert(0, num_hidden_layers=1 + rank)), "the model")
        assert_refused(training(teacher_model=bert(rank)), "teacher_model")
        assert_refused(training(teacher_model=[bert(1), bert(2 + rank)]), "teacher 2")
        assert_refused(partial(training(), resume_from_checkpoint=rank == 1), "the checkpoint to go on from")
        checks.__version__ = f"0.{rank}"
        assert_refused(training(), "the version of hf_compress of process 1 is 0.1, and of process 0 0.0")
        checks.__version__ = "0"
        assert raised(training(model=bert(rank))) is None  # DDP makes the weights those of rank 0

    ranks(job, 2)


@needs_fork
def test_weights_that_each_process_cuts_for_itself_are_the_same_ones(tmp_path):
    def job(rank):
        share_weights()
        assert_refused(trainer_of(tmp_path, model=bert(rank)).train, "the model of process 1")

    ranks(job, 2)


class Drawn(Dataset):
    """Other numbers at each reading, and an object that is told by its place in memory."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return {"x": torch.rand(1), "object": object()}


def test_what_cannot_be_told_apart_is_not():
    state = torch.get_rng_state()
    assert data_fact(Drawn()) == "4 examples (drawn anew)"
    assert torch.equal(state, torch.get_rng_state())
    assert data_fact([{"o": object()}]) == data_fact([{"o": object()}])
    assert data_fact([{"o": 1}]) != data_fact([{"o": 2}])
    assert data_fact([]) == "0 examples (" + data_fact([]).partition("(")[2] and data_fact(None) == "none"
    assert data_fact(rows(4).to_iterable_dataset()) == "a stream"
    assert weights_fact(bert(0)) == weights_fact(bert(0)) != weights_fact(bert(1))
    assert weights_fact(bert(0), values=False) == weights_fact(bert(1), values=False)


def test_one_process_alone_is_alike():
    check_same({"data": "any"}, "A training")
    with pytest.raises(KeyError, match="mine"), failing_together():
        raise KeyError("mine")


@needs_fork
def test_a_cache_that_ranks_write_together_is_of_one_teacher_and_one_text(tmp_path):
    def job(rank):
        PartialState(cpu=True)
        place = tmp_path / "cache"
        assert_refused(lambda: hfc.cache_teacher(bert(rank), rows(8), place), "teacher")
        assert_refused(lambda: hfc.cache_teacher(bert(0), rows(8 + rank), place), "dataset")
        assert_refused(lambda: hfc.cache_teacher(bert(0), rows(8), place, top_k=1 + rank), "top_k")
        (tmp_path / "file").write_text("no folder", encoding="utf-8")
        mine = raised(lambda: hfc.cache_teacher(bert(0), rows(8), tmp_path / "file" / "cache"))
        assert all("Not a directory" in text for text in of_both(mine))
        assert len(hfc.cache_teacher(bert(0), rows(8), place)) == 8

    ranks(job, 2)


@needs_fork
def test_a_recipe_is_one_on_all_ranks(tmp_path):
    model, data = tiny_folder(tmp_path / "start"), reviews(tmp_path / "reviews.csv")

    def job(rank):
        PartialState(cpu=True)

        def running(data=data, **given):
            stages = [{"quantize": {"bits": 4 + 4 * rank if given.pop("bits", False) else 8}}]
            return partial(hfc.Recipe(stages, model=str(model), data=str(data), **given).run, tmp_path / "out")

        assert_refused(running(bits=True), "A recipe has to be begun alike", "the recipe of process 1")
        assert_refused(running(seed=rank), "the recipe of process 1")
        mine = raised(running(data=tmp_path / "none.csv" if rank else data))
        assert all("none.csv" in text for text in of_both(mine))

    ranks(job, 2)
    assert not (tmp_path / "out").exists()


@needs_fork
@pytest.mark.parametrize(("who", "told"), [((0, 1), {0}), ((1,), {1}), pytest.param((0,), {0}, marks=pytest.mark.long)])
def test_one_process_tells_what_ended_them(who, told, tmp_path, monkeypatch):
    if who == (1,):  # nobody is going to tell in its place
        monkeypatch.setattr("hf_compress.training.ranks.PATIENCE", 0.2)

    def job(rank):
        def work():
            PartialState(cpu=True)
            if rank in who:
                raise ValueError("no such shard")
            PartialState().wait_for_everyone()  # as the next step of a training would

        with (tmp_path / f"{rank}").open("w", encoding="utf-8") as log, redirect_stderr(log):
            assert main.guarded(work) != 0

    assert main.guarded(lambda: None) == 0  # imports what is needed, once for all forks
    ranks(job, 2)
    logs = [(tmp_path / f"{rank}").read_text(encoding="utf-8") for rank in range(2)]
    said = [log for log in logs if "hf-compress" in log]
    assert len(said) == 1 and said[0].count("hf-compress") == 1 and "no such shard" in said[0]
    assert {rank for rank, log in enumerate(logs) if "hf-compress" in log} == told
