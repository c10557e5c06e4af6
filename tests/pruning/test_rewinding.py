"""Rewinding: the weights of an early step come back under the masks of the last, and stay saved until then."""

import copy

import pytest
import torch
from distillation.data import rows
from helpers import tiny_model
from pruning.test_callbacks import OurTrainer, arguments, train
from transformers import Trainer, TrainerCallback

import hf_compress as hfc


class Watch(TrainerCallback):
    """The weights after each step, once all callbacks before it have had their say."""

    def __init__(self):
        self.seen = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seen[state.global_step + 1] = {n: p.detach().clone() for n, p in self.model.named_parameters()}


def run(folder, to, kind=OurTrainer, resume=None, **options):
    pruning, watch = hfc.WeightPruning(0.5, begin=0.25, end=0.5, num_updates=2), Watch()
    trainer = kind(
        tiny_model("bert"), arguments(folder, **options), train_dataset=rows(),
        callbacks=[pruning, hfc.Rewinding(pruning, to), watch],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return pruning, watch, trainer


@pytest.mark.parametrize("to, step", [(0.0, 0), (0.125, 1), (0.25, 2)])
def test_the_weights_are_those_of_the_early_step_where_the_masks_allow_them(to, step, tmp_path):
    """8 steps; pruned at 2, 3 and 4, so the weights after step 4 are those after `step`, or zero."""
    pruning, watch, _ = run(tmp_path, to)
    early = watch.seen[step] if step else dict(tiny_model("bert").named_parameters())
    masks = {f"{name}.weight": mask for name, mask in pruning.masks.items()}
    assert pruning.current_sparsity == pytest.approx(0.5, abs=1e-3)
    for name, weight in watch.seen[4].items():
        assert torch.equal(weight, early[name] * masks.get(name, 1)), name
    for name, mask in masks.items():  # what follows trains what is left, and nothing else
        last = watch.seen[8][name]
        assert not last[~mask].any() and (last[mask] != watch.seen[4][name][mask]).float().mean() > 0.9


def test_a_resumed_training_goes_back_to_the_same_weights(tmp_path):
    whole = run(tmp_path, 0.125, save_strategy="steps", save_steps=3)[2]
    again = run(tmp_path, 0.125, resume=str(tmp_path / "checkpoint-3"))[2]
    assert all(map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values()))


def test_the_averages_of_the_optimizer_start_anew(tmp_path):
    pruning = hfc.WeightPruning(0.5, begin=0.0, end=0.5, num_updates=1)
    model = tiny_model("bert")
    counts = []

    class Count(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            counts.append(len(optimizer.state))

    trainer = OurTrainer(
        model, arguments(tmp_path), train_dataset=rows(), callbacks=[pruning, hfc.Rewinding(pruning), Count()]
    )
    trainer.train()
    assert counts[3] == 0 < min(counts[2], counts[4])


def test_the_pruning_trainer_has_it_as_an_option_and_finishes(tmp_path):
    start = copy.deepcopy(tiny_model("bert").state_dict())
    config = arguments(tmp_path, hfc.WeightPruningConfig, sparsity=0.5, begin=0.0, end=1.0, num_updates=2, rewind=0.0)
    trainer = hfc.WeightPruningTrainer(tiny_model("bert"), config, train_dataset=rows())
    trainer.train()
    for name, weight in trainer.model.state_dict().items():  # rewound after the last step: nothing has been trained
        assert torch.equal(weight, start[name].masked_fill(weight == 0, 0)), name
    assert sum(int((w == 0).sum()) for w in trainer.model.state_dict().values()) > 1000


def test_heads_stay_away_after_rewinding(tmp_path):
    pruning = hfc.HeadPruning(0.4, begin=0.0, end=0.5, num_updates=2)
    model = tiny_model("bert")
    trainer = OurTrainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[pruning, hfc.Rewinding(pruning)])
    trainer.train()
    hfc.finish(model)
    assert sum(a.num_heads for a in hfc.anatomy(model).attentions) == 10  # of 16


def test_what_could_not_be_rewound_is_refused(tmp_path):
    with pytest.raises(TypeError, match="belongs to a pruning with masks"):
        hfc.Rewinding(hfc.LayerPruning(0.5))
    for options, to in (({"begin": 0.1}, 0.2), ({"begin": 0.1}, -0.1), ({"begin": 0.1, "regrow": 0.9}, 0.0)):
        with pytest.raises(ValueError, match="The weights go back to a step from 0 to the beginning of pruning"):
            hfc.Rewinding(hfc.WeightPruning(0.5, **options), to)
    with pytest.raises(ValueError, match="to the beginning of pruning"):
        arguments(tmp_path, hfc.WeightPruningConfig, begin=0.1, rewind=0.5)
    with pytest.raises(ValueError, match="which a stock Trainer does not"):
        run(tmp_path, 0.0, Trainer)
    pruning = hfc.WeightPruning(0.5)
    with pytest.raises(ValueError, match="comes after its pruning"):
        train(tmp_path, hfc.Rewinding(pruning))
