"""Optimizers given by the user or made before training learn projections, gates and scales too; masks outlive them."""

import pytest
import torch
from distillation.data import rows
from distillation.training import config
from helpers import tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

import hf_compress as hfc
from hf_compress.distillation.students import make_student
from hf_compress.model.anatomy import anatomy
from hf_compress.model.weights import as_matrix
from hf_compress.training.optimizers import add_missing
from hf_compress.training.state import TrainingState


def student():
    return make_student(tiny_model("bert", seed=3), num_hidden_layers=2, hidden_size=16)


def distilling(model, folder, **given):
    args = config(folder, hints="1:2,2:4", learning_rate=1e-2, save_strategy="steps", save_steps=2)
    return hfc.DistillationTrainer(model, args, teacher_model=tiny_model("bert", seed=3), train_dataset=rows(), **given)


def gated(model, folder, **given):
    args = arguments(folder, hfc.HeadGatesConfig, l0=1.0, max_steps=3, learning_rate=1e-2)
    return hfc.HeadGatesTrainer(model, args, train_dataset=rows(), **given)


def quantized(model, folder, **given):
    args = arguments(folder, hfc.QBertConfig, learned_steps=True, max_steps=3, learning_rate=1e-2)
    return hfc.QBertTrainer(model, args, train_dataset=rows(), **given)


CASES = {"projections": (student, distilling), "gates": (lambda: tiny_model("bert"), gated),
         "scales": (lambda: tiny_model("bert"), quantized)}  # fmt: skip


class Last(TrainerCallback):
    """What the training state and the schedule hold after the last step, before anything is cut."""

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        self.learned = {n: p.detach().clone() for n, p in model.hfc_training_state.named_parameters()}
        self.rates = lr_scheduler.get_last_lr()


def assert_learned(trainer, last):
    start = {name: p.detach().clone() for name, p in trainer.training_state.named_parameters()}
    trainer.train()
    assert start and [name for name, value in start.items() if torch.equal(last.learned[name], value)] == []


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_and_schedule_of_the_user_learn_the_training_state(case, tmp_path, caplog):
    make_model, make_trainer = CASES[case]
    model, last = make_model(), Last()
    optimizer = torch.optim.Adam([{"params": [p], "lr": 1e-2} for p in model.parameters()])
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = make_trainer(model, tmp_path, optimizers=(optimizer, schedule), callbacks=[last])
    assert_learned(trainer, last)
    assert set(last.rates) == {1e-2 / 4} and "join its first group" in caplog.text


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_made_before_training_learns_the_training_state(case, tmp_path, caplog):
    make_model, make_trainer = CASES[case]
    last = Last()
    trainer = make_trainer(make_model(), tmp_path, callbacks=[last])
    trainer.create_optimizer()
    assert_learned(trainer, last)
    assert "first group" not in caplog.text  # they have had groups of their own from the beginning


def test_such_a_run_is_resumed_to_the_same_bits(tmp_path):
    """Step 3 again, from the checkpoint after step 2, with a new optimizer of the user's."""
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model, last = student(), Last()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        torch.manual_seed(0)
        distilling(model, tmp_path, optimizers=(optimizer, schedule), callbacks=[last]).train(
            resume_from_checkpoint=resume
        )
        ends.append({**model.state_dict(), **last.learned})
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


class Partial(OurTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([p for n, p in self.model.named_parameters() if "classifier" in n], lr=1.0)
        return self.optimizer


def test_an_optimizer_that_a_subclass_makes_learns_the_training_state(tmp_path):
    last = Last()
    callbacks = [hfc.HeadGates(1.0), last]
    assert_learned(Partial(tiny_model("bert"), arguments(tmp_path), train_dataset=rows(), callbacks=callbacks), last)


def test_where_nothing_can_be_added_it_is_said_before_training():
    state = TrainingState()
    state.add("projection", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not know projection.weight, projection.bias, .*optimizer_cls"):
        add_missing(torch.optim.SGD(torch.nn.Linear(1, 1).parameters()), state, may_add=False)


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Defazio et al., 2024, https://arxiv.org/abs/2405.15682, as their package does it: the weights are y while
    training and the mean x after `eval()`; z is where the steps are taken."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum, k=0, is_training=True))

    def _swap(self, weight, is_training):
        for group in self.param_groups:
            if group["is_training"] != is_training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight(group["momentum"]))
                group["is_training"] = is_training

    def eval(self):
        self._swap(lambda beta: 1 - 1 / beta, False)

    def train(self):
        self._swap(lambda beta: 1 - beta, True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for p in [p for p in group["params"] if p.grad is not None]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


MASKS = {"weights": lambda: hfc.WeightPruning(0.5, scope="class-uniform", begin=0.4, end=0.9),
         "movement": lambda: hfc.WeightPruning(0.5, method="movement", scope="class-uniform", begin=0.4, end=0.9),
         "blocks": lambda: hfc.BlockPruning(0.5, block_size=8, scope="class-uniform", begin=0.4, end=0.9)}  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", [Trainer, OurTrainer])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_masked_stays_zero_when_a_schedule_free_optimizer_swaps_the_weights(name, kind, family, tmp_path):
    model = tiny_model(family)
    callback, optimizer = MASKS[name](), ScheduleFreeSGD(model.parameters(), lr=0.1)
    data = rows(kind="clm" if family == "gpt2" else "classification")
    trainer = kind(model, arguments(tmp_path), train_dataset=data, callbacks=[callback],
                   optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)))  # fmt: skip
    trainer.train()
    for _ in range(2):
        optimizer.eval()
        for layer in anatomy(model).layers:
            module = layer.feed_forward.output
            weight = as_matrix(module, module.weight)
            assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        optimizer.train()
