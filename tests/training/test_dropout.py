"""Dropout as the arguments say, in every family, while a training lasts."""

import pytest
import torch
from distillation.data import rows
from distillation.training import config, pair
from helpers import CONFIGS, tiny_batch, tiny_model
from torch import nn

import hf_compress as hfc
from hf_compress.training.arguments import dropping

TEXT = sorted(set(CONFIGS) - {"vit"})
FREE = {"layerdrop", "encoder_layerdrop", "decoder_layerdrop"}  # layers that go, which is not dropout


def dropped_model(family: str):
    """A model whose configuration drops much, wherever it says so."""
    plain = tiny_model(family).config.to_dict()
    said = [
        name for name, value in plain.items() if "drop" in name and name not in FREE and isinstance(value, float | int)
    ]
    return tiny_model(family, **dict.fromkeys(said, 0.4)), said


@pytest.mark.parametrize("family", TEXT)
def test_none_at_zero_in_every_family_and_as_before_afterwards(family):
    model, said = dropped_model(family)
    batch = tiny_batch(model)
    answer = lambda: model(**batch)[0].detach()  # noqa: E731
    expected = answer()
    model.train()
    if said:
        assert not torch.equal(answer(), expected), "this configuration drops nothing"
    before = [(name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    with dropping(model, 0):
        torch.testing.assert_close(answer(), expected)
        assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    assert before == [(name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    if said:
        assert not torch.equal(answer(), expected)
    with dropping(model, None):
        assert before == [(name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]


def test_a_training_at_zero_is_that_of_a_model_without(tmp_path):
    """The steps are the same, and what is saved has the configuration that the user gave."""
    trained = []
    for share, dropout in ((0.0, None), (0.4, 0.0)):
        student, teacher = pair(hidden_dropout_prob=share, attention_probs_dropout_prob=share)
        args = config(tmp_path / str(share), max_steps=3, dropout=dropout)
        hfc.DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows(12)).train()
        assert student.config.hidden_dropout_prob == share
        assert {m.p for m in student.modules() if isinstance(m, nn.Dropout)} == {share}
        trained.append(student.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


@pytest.mark.parametrize("share", [-0.1, 1.0, 3])
def test_what_is_no_share_is_refused(share, tmp_path):
    with pytest.raises(ValueError, match="dropout is a share of the activations, at least 0 and below 1"):
        hfc.WeightPruningConfig(str(tmp_path), dropout=share)
