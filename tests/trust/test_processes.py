"""Two processes follow the trajectory of one with the same global batch, for every trainer, and agree to the bit."""

import os
import socket
import traceback

import pytest
import torch
from trust.trainers import TRAINERS, run

# one process's batch is 8, two have 4 each: their losses are sums over the same 8 examples, in another order
TOLERANCE = 1e-4
ALIKE = [
    name for name in TRAINERS if name != "RelationalTrainer"
]  # relations are those of examples in a batch together
OPTIONS = {"DistillationTrainer": {"teacher_noise": 0.0}}  # the noise of an example is drawn by its place in the batch


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
                job(rank)
                status = 0
            except BaseException:  # told by the status; the test shows the text
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * number


@pytest.mark.long
@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_follow_one(name, tmp_path):
    def job(number):
        def train(rank):
            result = run(name, tmp_path / str(number), dropout=0.0, per_device_train_batch_size=8 // number,
                         save_strategy="steps", save_steps=3, **OPTIONS.get(name, {}))  # fmt: skip
            torch.save(result, tmp_path / f"{number}-{rank}.pt")

        return train

    for number in (1, 2):
        ranks(job(number), number)
    one, first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("1-0", "2-0", "2-1"))
    for key, tensor in first[0].items():
        if key.startswith((".model", ".state", "end")) and "input_range" not in key:  # a range is each rank's own
            assert torch.equal(tensor, second[0][key]), key
    losses = [[{k: v for k, v in e.items() if k.endswith("loss")} for e in r[1] if "loss" in e] for r in (one, first)]
    assert len(losses[0]) == len(losses[1]) == 6
    for mine, theirs in zip(*losses, strict=True):
        assert theirs == pytest.approx(mine, rel=TOLERANCE, abs=1e-6)
    names = [sorted(p.name for p in (tmp_path / n / "checkpoint-3").iterdir()) for n in "12"]
    assert [n for n in names[1] if "rng_state" not in n] == [n for n in names[0] if "rng_state" not in n]
