"""A teacher under FSDP2: each of two processes holds half of it, and its outputs are those of the whole."""

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_batch, tiny_model
from machine import needs_fork, ranks

from hf_compress.distillation.teachers.teacher import frozen
from hf_compress.model.capture import capture


@needs_fork
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_each_process_holds_half(family):
    def job(rank):
        dist.init_process_group("gloo")
        whole = tiny_model(family, seed=3)
        teacher = frozen(tiny_model(family, seed=3), torch.device("cpu"), is_sharded=True)
        size = sum(p.numel() for p in whole.parameters())
        batch = tiny_batch(whole, seed=rank)  # each process has its own examples
        with torch.no_grad(), capture(teacher, hidden_states=[0, 2], attention=[1]) as mine:
            logits = teacher(**batch).logits
        with torch.no_grad(), capture(whole, hidden_states=[0, 2], attention=[1]) as theirs:
            torch.testing.assert_close(logits, whole(**batch).logits)
        for number in (0, 2):
            torch.testing.assert_close(mine.hidden_states[number], theirs.hidden_states[number])
        torch.testing.assert_close(mine.attention[1].scores, theirs.attention[1].scores)
        held = sum(p.to_local().numel() for p in teacher.parameters())
        assert held < 0.55 * size, (held, size)
        assert not any(p.requires_grad for p in teacher.parameters())
        dist.destroy_process_group()

    ranks(job, 2)
