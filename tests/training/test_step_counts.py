"""The loss of a step is one mean over its labels, however it is cut into micro-batches, for every task and family."""

import copy

import pytest
import torch
from datasets import Dataset
from distillation.data import rows
from distillation.training import config
from helpers import tiny_model
from machine import needs_fork
from torch import nn
from transformers import (
    BertForMultipleChoice,
    BertForTokenClassification,
    LlamaForTokenClassification,
)
from trust.test_processes import ranks

import hf_compress as hfc
from hf_compress.training.arguments import CompressionArguments
from hf_compress.training.checks import has_own_mean
from hf_compress.training.state import TrainingStateMixin

CASES = [  # family, task of `helpers`, rows, changes of the config
    ("bert", "tokens", "tokens", {"num_labels": 3}),
    ("llama", LlamaForTokenClassification, "tokens", {"num_labels": 3}),
    ("modernbert", "tokens", "tokens", {"num_labels": 3}),
    ("bert", "mlm", "mlm", {}),
    ("modernbert", "mlm", "mlm", {}),
    ("xlm", "mlm", "mlm", {}),
    ("bert", "answers", "answers", {}),
    ("qwen3", "answers", "answers", {}),
    ("bert", "classification", "classification", {"num_labels": 3}),
    ("llama", "classification", "classification", {"num_labels": 3}),
    ("llama", "classification", "multi", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    ("bert", "classification", "regression", {"num_labels": 1}),
    ("llama", "classification", "regression", {"num_labels": 1}),
    ("bert", BertForMultipleChoice, "choices", {}),
    ("bart", "seq2seq", "seq2seq", {}),
    ("t5", "seq2seq", "seq2seq", {}),
    ("llama", "clm", "clm", {}),
]


def quiet(family, task, **changes):
    """A model without dropout in float64."""
    changes |= {"pad_token_id": 0} if family in ("llama", "gpt2", "qwen3") else {}
    if isinstance(task, type):
        model = task(tiny_model(family, **changes).config)
    else:
        model = tiny_model(family, task, **changes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_p", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.double()


def uneven(kind, number=8):
    """Rows of which most have few labels: the first has all of its own, the others one or none."""
    data = rows(number, kind="classification" if kind == "choices" else kind, labels=3)
    if kind == "choices":
        pairs = [[a, b] for a, b in zip(data["input_ids"], reversed(list(data["input_ids"])), strict=True)]
        labels = [row if i in (0, 5) else -100 for i, row in enumerate([1, 0] * (number // 2))]
        return Dataset.from_dict({"input_ids": pairs, "labels": labels})
    if kind == "answers":
        few = {i: {} if i in (0, 5, 6) else {"start_positions": 99, "end_positions": 99} for i in range(number)}
        return data.map(lambda row, i: {**row, **few[i]}, with_indices=True)
    if kind == "classification":
        return data.map(lambda row, i: {"labels": row["labels"] if i in (0, 5, 6) else -100}, with_indices=True)
    if kind in ("multi", "regression"):  # every row has its labels: here micro-batches differ in size
        return data.select(range(7))

    def blank(row, i):
        last = max(place for place, label in enumerate(row["labels"]) if label != -100)
        return {"labels": [x if i == 0 or (i % 3 and place == last) else -100 for place, x in enumerate(row["labels"])]}

    return data.map(blank, with_indices=True)


def batch_of(data):
    return {name: torch.tensor(data[name]) for name in data.column_names}


def one_step(model, data, folder, *, size, kind=TrainingStateMixin, args=CompressionArguments, **options):
    """What one step of SGD at a rate of 1 adds to the parameters."""
    start = copy.deepcopy(model)
    defaults = {"max_steps": 1, "learning_rate": 1.0, "gradient_accumulation_steps": -(-len(data) // size)}
    args = config(folder, args, per_device_train_batch_size=size, optim="sgd", lr_scheduler_type="constant",
                  max_grad_norm=0.0, **{**defaults, **options})  # fmt: skip
    trainer = kind(model, args, train_dataset=data)
    trainer.train()
    named = dict(start.named_parameters())
    moved = [(p.detach() - named[n]).flatten() for n, p in trainer.model.named_parameters() if n in named]
    return torch.cat(moved), trainer.state.log_history[0]["loss"]


def apart(found, expected):
    assert expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family, task, kind, changes", CASES)
def test_four_micro_batches_of_two_are_one_batch_of_eight(family, task, kind, changes, tmp_path):
    """Against the gradient of the model's own mean over all eight rows, taken by autograd alone."""
    model, data = quiet(family, task, **changes), uneven(kind)
    reference = copy.deepcopy(model).train()
    batch = batch_of(data)
    if kind in ("multi", "regression"):
        batch["labels"] = batch["labels"].double()
    loss = reference(**batch).loss
    loss.backward()
    expected = -torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in reference.parameters()]
    )
    found, logged = one_step(model, data, tmp_path, size=2)
    # the counts are float32, and so are labels that are numbers: 2^-24 each
    assert apart(found, expected) < 1e-6
    assert logged == pytest.approx(loss.item(), rel=1e-3)  # Trainer rounds what it logs


PRUNING = {"HeadPruningTrainer": {}, "NeuronPruningTrainer": {}, "WeightPruningTrainer": {},
           "BlockPruningTrainer": {"block_size": 8}, "LayerPruningTrainer": {"drop_rate": 0.0},
           "HeadGatesTrainer": {"l0": 0.0, "initial": 50.0}}  # fmt: skip
QBERT = {"embedding_bits": None}  # the table of a language model is its head as well


@pytest.mark.parametrize("task", ["tokens", "mlm"])
@pytest.mark.parametrize("name", [*PRUNING, "QBertTrainer"])
def test_pruning_and_quantizing_trainers_divide_once(name, task, tmp_path):
    """Q-BERT's input ranges follow each micro-batch: there all rows read the same tokens, for one step."""
    data, found = uneven(task), []
    if name == "QBertTrainer":
        same = {column: data[0][column] for column in ("input_ids", "attention_mask")}
        data = data.map(lambda row: same)
    options = {"sparsity": 0.0} if name not in ("LayerPruningTrainer", "HeadGatesTrainer", "QBertTrainer") else {}
    options |= {"finish_at_end": False, "learning_rate": 0.1, **PRUNING.get(name, QBERT)}
    options["max_steps"] = 1 if name == "QBertTrainer" else 3
    for size in (8, 2):
        model = quiet("bert", task, **({"num_labels": 3} if task == "tokens" else {}))
        kind, args = getattr(hfc, name), getattr(hfc, name.replace("Trainer", "Config"))
        found.append(one_step(model, data, tmp_path, size=size, kind=kind, args=args, **options)[0])
    assert apart(found[1], found[0]) < 1e-6


def test_a_step_without_any_label_moves_nothing(tmp_path):
    data = uneven("tokens").map(lambda row: {"labels": [-100] * len(row["labels"])})
    found, logged = one_step(quiet("bert", "tokens", num_labels=3), data, tmp_path, size=2)
    assert not found.any() and logged == 0


def test_label_smoothing_is_divided_as_well(tmp_path):
    found = []
    for size in (8, 2):
        model = quiet("bert", "tokens", num_labels=3)
        found.append(one_step(model, uneven("tokens"), tmp_path, size=size, label_smoothing_factor=0.1)[0])
    assert apart(found[1], found[0]) < 1e-6


@needs_fork
def test_two_processes_with_unlike_numbers_of_labels_are_one(tmp_path):
    """One has rows of all labels, the other rows of few; each in two micro-batches of two."""
    data = uneven("tokens")

    def train(rank):
        model = quiet("bert", "tokens", num_labels=3)
        moved, logged = one_step(model, data, tmp_path, size=2, gradient_accumulation_steps=2)
        torch.save((moved.detach(), logged), tmp_path / f"rank-{rank}.pt")

    ranks(train, 2)
    expected, loss = one_step(quiet("bert", "tokens", num_labels=3), data, tmp_path, size=8)
    for rank in range(2):
        found, logged = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert apart(found, expected) < 1e-6 and logged == pytest.approx(loss, rel=1e-3)


class OwnTagger(BertForTokenClassification):
    """A class of the user's own, made of one of Transformers."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


class OwnLoss(nn.Module):
    """A model of the user's own, whose loss is believed."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, x, labels=None, **kwargs):
        return ((self.a * x - labels) ** 2).mean(), self.a * x


def test_a_class_made_of_another_is_known_by_it(tmp_path):
    model = quiet("bert", OwnTagger, num_labels=3)
    reference = copy.deepcopy(model)
    reference(**batch_of(uneven("tokens"))).loss.backward()
    expected = -torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert apart(one_step(model, uneven("tokens"), tmp_path, size=2)[0], expected) < 1e-6


def test_who_divides_by_the_whole_step():
    """Decoders' classifiers call the common loss without what they were told; their language models pass it on."""
    assert has_own_mean(tiny_model("bert")) and has_own_mean(tiny_model("llama", "classification"))
    assert has_own_mean(tiny_model("qwen3", "answers"))
    assert not has_own_mean(tiny_model("llama", "clm")) and not has_own_mean(tiny_model("modernbert", "mlm"))
    assert not has_own_mean(OwnLoss())
