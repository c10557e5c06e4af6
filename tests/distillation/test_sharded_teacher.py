"""A teacher under FSDP2: each of two processes holds half of it, and its outputs are those of the whole."""

import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from helpers import tiny_batch, tiny_model
from hf_compress.model.capture import capture
from hf_compress.distillation.teachers.teacher import frozen

dist.init_process_group("gloo")
for family in ("bert", "llama"):
    whole = tiny_model(family, seed=3)
    teacher = frozen(tiny_model(family, seed=3), torch.device("cpu"), is_sharded=True)
    size = sum(p.numel() for p in whole.parameters())
    batch = tiny_batch(whole, seed=dist.get_rank())  # each process has its own examples
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
"""


def test_each_process_holds_half(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")
    command = [sys.executable, *launcher, str(script), str(Path(__file__).parent.parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
