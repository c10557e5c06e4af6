"""Trainers are called, told and copied as Trainer is."""

import copy

import pytest
import torch
from distillation.data import rows
from distillation.training import config, pair
from helpers import tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, default_data_collator
from trust.trainers import TRAINERS, build

import hf_compress as hfc
from hf_compress.recipe.options import build as build_options


@pytest.mark.parametrize("name", TRAINERS)
def test_arguments_of_another_trainer_are_refused_by_name(name, tmp_path):
    others = {"teacher_model": tiny_model("bert")} if issubclass(getattr(hfc, name), hfc.DistillationTrainer) else {}
    if name == "MutualTrainer":
        others = {"peers": [tiny_model("bert")]}
    if name == "SelfDistillationTrainer":
        others = {}
    kind = name.replace("Trainer", "Config")
    with pytest.raises(TypeError, match=f"{name} needs args of type {kind}, got TrainingArguments"):
        getattr(hfc, name)(tiny_model("bert"), TrainingArguments(str(tmp_path), report_to="none"), **others)


def test_positional_arguments_are_those_of_trainer(tmp_path):
    """Model, arguments, collator, training set, evaluation set."""
    student, teacher = pair()
    data, other = rows(8), rows(4, seed=1)
    calls = {
        hfc.DistillationTrainer: {"teacher_model": teacher},
        hfc.MutualTrainer: {"peers": [tiny_model("bert")]},
        hfc.SelfDistillationTrainer: {},
        hfc.WeightPruningTrainer: {},
        hfc.QBertTrainer: {},
    }
    for kind, extra in calls.items():
        args = config(tmp_path, getattr(hfc, kind.__name__.replace("Trainer", "Config")), max_steps=1)
        trainer = kind(copy.deepcopy(student), args, default_data_collator, data, other, **extra)
        assert trainer.data_collator is default_data_collator
        assert trainer.train_dataset is data and trainer.eval_dataset is other
        trainer.train()
    args = config(tmp_path)
    for third in (teacher, "folder", [teacher, teacher]):
        with pytest.raises(TypeError, match="of DistillationTrainer is the data_collator, .*teacher_model="):
            hfc.DistillationTrainer(student, args, third)
    with pytest.raises(TypeError, match="was given train_dataset twice"):
        hfc.DistillationTrainer(student, args, None, data, train_dataset=data, teacher_model=teacher)


def test_several_devices_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    for name in ("DistillationTrainer", "HeadPruningTrainer", "QBertTrainer"):
        with pytest.raises(ValueError, match=f"{name} would copy the model to 2 devices .*torchrun"):
            build(name, tmp_path)


def test_what_a_command_line_can_say(tmp_path):
    parser = HfArgumentParser(hfc.QBertConfig)
    for words, bits in ((["--embedding_bits", "0"], None), (["--embedding_bits", "4"], 4), ([], 8)):
        (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
        assert parsed.embedding_bits == bits
    for kind in (hfc.QBertConfig, hfc.DistillationConfig, hfc.WeightPruningConfig):
        given = {"report_to": "none"} | ({"embedding_bits": "none"} if kind is hfc.QBertConfig else {})
        options = build_options(kind, given, "here", output_dir=str(tmp_path))
        assert options.report_to == [] and getattr(options, "embedding_bits", None) is None
    assert build_options(hfc.DistillationConfig, {"hints": "none"}, "here", output_dir=str(tmp_path)).hints is None


def test_embeddings_stay_as_they_are_without_bits(tmp_path):
    model = tiny_model("bert")
    args = arguments(tmp_path, hfc.QBertConfig, embedding_bits=0, max_steps=1)
    hfc.QBertTrainer(model, args, train_dataset=rows()).train()
    assert type(model.bert.embeddings.word_embeddings) is torch.nn.Embedding


class Keep(TrainerCallback):
    """What users do in callbacks: keep the whole model, on disk and in memory."""

    def __init__(self, file):
        self.file = file

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            was_training = model.training
            torch.save(model, self.file)
            self.copied = copy.deepcopy(model).eval()
            self.expected = logits(model.eval())
            model.train(was_training)


HOOKED = {
    "plain": list,
    "heads": lambda: [hfc.HeadPruning(0.5, begin=0.0)],
    "wanda": lambda: [hfc.WeightPruning(0.5, method="wanda", begin=0.0)],
    "layers": lambda: [hfc.LayerPruning(0.5)],
    "gates": lambda: [hfc.HeadGates(1.0, end=1.0)],
    "gates-and-layers": lambda: [hfc.HeadGates(1.0, end=1.0), hfc.LayerPruning(0.5)],
    "grids": lambda: [hfc.QuantizationAware()],
    "gates-on-grids": lambda: [hfc.QuantizationAware(), hfc.HeadGates(1.0, end=1.0)],
}


@pytest.mark.parametrize("family", ["bert", "bart"])
@pytest.mark.parametrize("name", HOOKED)
def test_a_callback_may_save_and_copy_the_whole_model(name, family, tmp_path):
    """The copies answer as the model does at that time, gates half open and layers passed over, and end like it."""
    keep, model = Keep(tmp_path / "model.pt"), tiny_model(family)
    if "grids" in name:
        hfc.prepare_qat(model, 4, embedding_bits=None if family == "bart" else 8, range_method="minmax")
    data = rows(kind="seq2seq" if family == "bart" else "classification")
    trainer = OurTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=data,
                         callbacks=[*HOOKED[name](), keep])  # fmt: skip
    trainer.train()
    loaded = torch.load(tmp_path / "model.pt", weights_only=False).eval()
    for other in (loaded, keep.copied):
        assert torch.equal(logits(other), keep.expected)
        assert not any("hfc_training_state" in key for key in other.state_dict())
    trained = model.double().eval()
    expected, twin = logits(trained), hfc.finish(copy.deepcopy(trained))
    assert torch.equal(logits(trained), expected)  # nothing of the copy is shared
    torch.testing.assert_close(logits(twin), expected, rtol=0, atol=1e-9)
