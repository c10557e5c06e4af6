"""NaN and infinity are found where they arise and named; training in bfloat16 stays finite."""

import math

import pytest
import torch
from helpers import tiny_model
from trust.trainers import TRAINERS, build

from hf_compress.finite import find_not_finite

QUICK = ("MiniLMTrainer", "QBertTrainer")
LONG = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in TRAINERS]


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
def test_training_in_bfloat16_stays_finite(name, tmp_path):
    trainer = build(name, tmp_path, max_steps=3, bf16=True)
    trainer.train()
    losses = [value for entry in trainer.state.log_history for key, value in entry.items() if key.endswith("loss")]
    assert len(losses) >= 3 and all(map(math.isfinite, losses))
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
