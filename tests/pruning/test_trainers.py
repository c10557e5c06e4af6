"""The thin trainers: settings in, a smaller model out; and masks that are the same on two processes."""

import sys

import pytest
import torch
from distillation.data import rows
from helpers import tiny_batch, tiny_model
from machine import needs_fork, ranks
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from transformers import HfArgumentParser

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy
from hf_compress.pruning import METHODS

TRAINERS = {
    "heads": (hfc.HeadPruningTrainer, hfc.HeadPruningConfig, {}),
    "neurons": (hfc.NeuronPruningTrainer, hfc.NeuronPruningConfig, {}),
    "weights": (hfc.WeightPruningTrainer, hfc.WeightPruningConfig, {"scope": "row", "method": "wanda"}),
    "blocks": (hfc.BlockPruningTrainer, hfc.BlockPruningConfig, {"block_size": 8}),
    "layers": (hfc.LayerPruningTrainer, hfc.LayerPruningConfig, {"share": 0.5}),
    "head-gates": (hfc.HeadGatesTrainer, hfc.HeadGatesConfig, {"l0": 5.0, "gate_rate": 3000.0}),
    "rank-gates": (hfc.RankGatesTrainer, hfc.RankGatesConfig, {"sparsity": 0.6}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_prunes_cuts_and_saves_small(name, tmp_path):
    kind, config, options = TRAINERS[name]
    model, data = tiny_model("bert"), rows()
    model = hfc.factorise(model, rank=8) if name == "rank-gates" else model
    size = model.num_parameters()
    trainer = kind(model, arguments(tmp_path, config, **options), train_dataset=data, eval_dataset=rows(8, seed=1))
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    if name != "weights":
        assert model.num_parameters() < size
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, tiny_batch(model)), logits(model.eval(), tiny_batch(model)))
    again = OurTrainer(model, arguments(tmp_path), train_dataset=data)  # what is left can be trained on
    again.train()


def test_each_method_has_its_entry_and_parses_from_the_command_line(tmp_path):
    assert METHODS.keys() == TRAINERS.keys()
    for name, (module, config, trainer) in METHODS.items():
        assert getattr(sys.modules[module], trainer) is TRAINERS[name][0]
        (parsed,) = HfArgumentParser(TRAINERS[name][1]).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
        assert type(parsed).__name__ == config


def test_settings_are_checked_when_they_are_made(tmp_path):
    with pytest.raises(ValueError, match="ends before it starts: begin=0.5, end=0.1"):
        hfc.HeadPruningConfig(str(tmp_path), begin=0.5, end=0.1)
    with pytest.raises(TypeError, match="HeadPruningTrainer needs args of type HeadPruningConfig"):
        hfc.HeadPruningTrainer(tiny_model("bert"), arguments(tmp_path))


def test_layers_are_dropped_by_chance_in_training_and_those_that_will_go_in_evaluation():
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    batch, callback = tiny_batch(model), hfc.LayerPruning(0.5)
    whole = logits(model, batch)
    half = tiny_model("bert")
    hfc.prune_layers(half, keep=[0, 2])
    expected = logits(half, batch)
    shorter = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    hfc.prune_layers(shorter, keep=[i for i in range(4) if i != 2])
    callback.on_train_begin(None, None, None, model=model)
    assert torch.equal(logits(model, batch), expected)
    model.train()
    seed = next(s for s in range(999) if (torch.manual_seed(s), (torch.rand(4) < 0.5).tolist())[1] == [0, 0, 1, 0])
    torch.manual_seed(seed)
    assert torch.equal(logits(model, batch), logits(shorter, batch))
    callback.on_train_end(None, None, None)
    assert torch.equal(logits(model, batch), whole)  # nothing is dropped any more
    assert torch.equal(logits(model.eval(), batch), expected)
    assert [layer.name for layer in anatomy(callback.finish(model)).layers] == [
        f"bert.encoder.layer.{i}" for i in (0, 1)
    ]
    assert torch.equal(logits(model, batch), expected)


def masks_of(output, batch_size):
    """A short run on one of several ranks, which writes its masks and what they cut."""

    def job(rank):
        model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
        args = arguments(output, max_steps=6, per_device_train_batch_size=batch_size)
        callbacks = [
            hfc.HeadPruning(0.4, begin=0.0, end=0.7, num_updates=2),
            hfc.WeightPruning(0.3, method="movement", begin=0.0, end=1.0, num_updates=1),
        ]
        trainer = OurTrainer(model, args, train_dataset=rows(48), callbacks=callbacks)
        trainer.train()
        masks = {name: mask.float() for name, mask in trainer.training_state.state_dict().items() if "head" in name}
        masks |= {name: tensor for name, tensor in model.state_dict().items() if "attention" in name}
        torch.save(masks, f"{output}-{rank}")

    return job


@needs_fork
def test_two_processes_hold_the_same_masks_and_see_all_examples(tmp_path):
    """Importance is gathered over both ranks: heads chosen by two processes of 4 examples are those of one of 8."""
    ranks(masks_of(tmp_path / "one", 8), 1)
    ranks(masks_of(tmp_path / "two", 4), 2)
    one, first, second = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    assert any(name.endswith("mask_0") for name in one)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if "mask" in name:
            assert torch.equal(tensor, one[name]), name
    assert sum(float(tensor.sum()) for name, tensor in one.items() if "mask" in name) == 10
