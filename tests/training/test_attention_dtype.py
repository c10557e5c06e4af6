"""Fused attention of a training on a CPU: in float32, whose gradients are the faster ones, and as exact or more so."""

import pytest
import torch
import torch.nn.functional as F
from distillation.training import trainer_of
from helpers import tiny_batch, tiny_model

import hf_compress as hfc
from hf_compress.model.precision import attention_with_fast_gradients


@pytest.fixture
def seen(monkeypatch):
    """The dtypes in which fused attention was computed."""
    dtypes, plain = [], F.scaled_dot_product_attention

    def attend(query, *rest, **said):
        dtypes.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype)
        return plain(query, *rest, **said)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return dtypes


def gradients(model, *, fast: bool) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), attention_with_fast_gradients(enabled=fast):
        model(**tiny_batch(model))[0].float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "bart", "qwen2", "modernbert"])
def test_it_is_float32_where_it_is_differentiated_alone(family, seen):
    model = tiny_model(family, attn="sdpa")
    before = gradients(model, fast=False)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    torch.testing.assert_close(gradients(model, fast=True), before, rtol=0.05, atol=0.02 * float(before.abs().max()))
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), attention_with_fast_gradients():
        model(**tiny_batch(model))
    gradients(model, fast=False)  # as it was
    assert set(seen) == {torch.bfloat16}


def test_trainers_do_so_under_autocast(tmp_path, seen):
    for bf16, expected in ((True, torch.float32), (False, torch.float32)):
        seen.clear()
        trainer = trainer_of(hfc.DistillationTrainer, tmp_path, bf16=bf16, dropout=0.0)
        trainer.train()
        assert expected in seen and (torch.bfloat16 in seen) == bf16  # the teacher's forward stays in bfloat16
