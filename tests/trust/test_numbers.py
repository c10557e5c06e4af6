"""NaN and infinity are found where they arise and named; half precision stays finite, deterministic mode repeats."""

import math
import os
from functools import partial
from unittest import mock

import pytest
import torch
from helpers import tiny_model
from machine import long_but
from trust.trainers import TRAINERS, assert_same, build, run

from hf_compress.training.finite import find_not_finite

QUICK = ("MiniLMTrainer", "QBertTrainer")
LONG = long_but(TRAINERS, *QUICK)


@pytest.mark.parametrize("name", ["DistillationTrainer", "HeadPruningTrainer"])
def test_a_loss_that_is_nan_ends_the_training_and_names_the_weight(name, tmp_path):
    trainer = build(name, tmp_path)
    trainer.model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"nan at step 1: the weight \S*layer.1.output.dense.weight holds NaN"):
        trainer.train()


def test_losses_that_are_nan_are_named(tmp_path):
    trainer = build("DistillationTrainer", tmp_path, hints=None)
    trainer.teacher.classifier.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="so the loss itself makes it.*not finite: soft_loss") as error:
        trainer.train()
    assert "task_loss" not in str(error.value)


def test_the_layer_or_the_input_where_it_arises_is_named():
    model = tiny_model("vit")
    pixels = torch.zeros(1, 3, 16, 16)
    assert "all weights, inputs and outputs of layers are finite" in find_not_finite(model, {"pixel_values": pixels})
    pixels[0, 0, 0, 0] = float("inf")
    assert find_not_finite(model, {"pixel_values": pixels}) == "'pixel_values' of the batch holds NaN or infinity"
    model = tiny_model("bert")
    model.bert.pooler.dense.weight.data.fill_(3e38)
    text = find_not_finite(model, {"input_ids": torch.arange(6)[None], "idx": torch.zeros(1)})
    assert text == "bert.pooler.dense gives NaN or infinity although its weights and the batch hold none"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_training_in_half_precision_stays_finite(name, dtype, tmp_path):
    """For float16 `Trainer` asks for a GPU, so its autocast is put in place by hand, without a loss scale."""
    trainer = build(name, tmp_path, max_steps=3, bf16=dtype == torch.bfloat16)
    if dtype == torch.float16:
        trainer.compute_loss_context_manager = partial(torch.autocast, "cpu", dtype)
    kinds = set()
    projection = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
    projection.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    trainer.train()
    losses = [value for entry in trainer.state.log_history for key, value in entry.items() if key.endswith("loss")]
    assert len(losses) >= 3 and all(map(math.isfinite, losses))
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert kinds == {dtype}


@pytest.fixture
def restored():
    """Deterministic mode is a setting of the process."""
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("name", LONG)
def test_deterministic_mode_gives_the_same_bits_twice(name, tmp_path, restored):
    first, second = (run(name, tmp_path / n, max_steps=3, full_determinism=True) for n in "12")
    assert torch.are_deterministic_algorithms_enabled()
    assert_same(first, second)
