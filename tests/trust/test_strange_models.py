"""What is no model of Transformers, or has no weights: said by each verb, before it changes or reads anything."""

import pytest
import torch
from distillation.data import rows
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import hf_compress as hfc

BATCHES = [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}]
CHANGE = {
    "quantize": lambda model, folder: hfc.quantize(model, bits=8),
    "gptq": lambda model, folder: hfc.quantize(model, bits=4, method="gptq", calibration=BATCHES),
    "prepare_qat": lambda model, folder: hfc.prepare_qat(model, 4),
    "to_block_sparse": lambda model, folder: hfc.to_block_sparse(model, 8),
    "factorise": lambda model, folder: hfc.factorise(model, rank=2),
    "factorise_embeddings": lambda model, folder: hfc.factorise_embeddings(model, 2),
}
READ = {
    "export": lambda model, folder: hfc.export(model, folder / "exported", format="plain"),
    "push_to_hub": lambda model, folder: hfc.push_to_hub(model, "user/name", dry_run=True),
    "hessian_sensitivity": lambda model, folder: hfc.hessian_sensitivity(model, BATCHES),
    "head_importance": lambda model, folder: hfc.head_importance(model, BATCHES),
    "layer_importance": lambda model, folder: hfc.layer_importance(model, BATCHES),
    "neuron_importance": lambda model, folder: hfc.neuron_importance(model, BATCHES),
}
SHAPES = {
    "prune_heads": lambda model, folder: hfc.prune_heads(model, {0: [0]}),
    "prune_neurons": lambda model, folder: hfc.prune_neurons(model, {0: [0]}),
    "prune_layers": lambda model, folder: hfc.prune_layers(model, [0]),
    "merge_neurons": lambda model, folder: hfc.merge_neurons(model, {0: 1}),
    "pack_qat": lambda model, folder: hfc.pack_qat(model),
}
ALL = CHANGE | READ | SHAPES


def distilled(student, teacher, folder):
    args = hfc.DistillationConfig(folder / "out", use_cpu=True, report_to="none")
    return hfc.DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows(4))


RUN = {  # with a forward
    "cache_teacher": lambda model, folder: hfc.cache_teacher(model, rows(4), folder / "cache"),
    "measure": lambda model, folder: hfc.measure(model),
    "student": lambda model, folder: distilled(model, tiny_model("bert"), folder),
    "teacher": lambda model, folder: distilled(tiny_model("bert"), model, folder),
    "second teacher": lambda model, folder: distilled(tiny_model("bert"), [tiny_model("bert"), model], folder),
    "pruned": lambda model, folder: hfc.HeadPruningTrainer(
        model, hfc.HeadPruningConfig(folder / "out", use_cpu=True, report_to="none"), train_dataset=rows(4)
    ),
}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_model("bert")

    def forward(self, **inputs):
        return self.model(**inputs)


def kept(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("verb", ALL)
def test_what_is_no_model_of_transformers_is_named_and_stays_as_it_was(verb, tmp_path):
    own = Own()
    before = kept(own)
    for model, kind in ((own, "Own. Pass the one inside it"), (None, "NoneType. Load it"), ("folder", "str. Load it")):
        with pytest.raises(TypeError, match=f"takes a model of Transformers, got {kind}"):
            ALL[verb](model, tmp_path)
    torch.testing.assert_close(kept(own), before, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", CHANGE | READ | RUN)
def test_weights_that_nobody_loaded_are_named(verb, tmp_path):
    with pytest.raises(ValueError, match=r"reads weights, and .*embeddings.weight is not loaded"):
        (CHANGE | READ | RUN)[verb](tiny_model("bert").to("meta"), tmp_path)


@pytest.mark.parametrize("verb", CHANGE)
def test_the_model_under_adapters_is_not_changed(verb, tmp_path):
    model = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    before = kept(model)
    with pytest.raises(ValueError, match="(?i)merge (them|adapters) first"):
        CHANGE[verb](model, tmp_path)
    torch.testing.assert_close(kept(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("verb", ["hessian_sensitivity", "head_importance", "layer_importance", "neuron_importance"])
def test_rows_in_place_of_batches_are_named(verb):
    for data in (rows(4), rows(4).with_format("torch"), DataLoader(rows(4), batch_size=None)):
        with pytest.raises(ValueError, match="no batch of tensors, as a single row is none"):
            getattr(hfc, verb)(tiny_model("bert"), data)


STRANGE = {
    "row of None": (
        lambda m: hfc.quantize(m, method="gptq", calibration=[None]),
        "must hold the numbers of a row, got None",
    ),
    "a long row": (
        lambda m: hfc.quantize(m, method="gptq", calibration=[{"input_ids": [5] * 65}]),
        r"a row of 65 tokens, and BertForSequenceClassification has 64 positions\. Cut the text: .*max_length=64",
    ),
    "no bundles": (
        lambda m: hfc.prepare_qat(m, 4, num_groups=0),
        "num_groups is a number of bundles of rows",
    ),
    "no expression": (lambda m: hfc.quantize(m, skip_modules=["("]), r"skip_modules: '\(' is no regular expression"),
    "too many bits": (
        lambda m: hfc.allocate_bits(m, {"bert.encoder.layer.0.output.dense": 1.0}, average_bits=99),
        "at most the 8 of the choices, got 99",
    ),
    "names to merge": (lambda m: hfc.merge_neurons(m, {0: [1]}), r"0 to 47 can go, got \[1\]"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_values_that_no_training_could_use_are_named(what):
    verb, message = STRANGE[what]
    model = tiny_model("bert")
    before = kept(model)
    with pytest.raises(ValueError, match=message):
        verb(model)
    torch.testing.assert_close(kept(model), before, rtol=0, atol=0)


def test_a_cache_counts_in_examples(tmp_path):
    with pytest.raises(ValueError, match="batch_size and shard_size count examples, 1 or more, got 32 and 0"):
        hfc.cache_teacher(tiny_model("bert"), rows(4), tmp_path / "cache", shard_size=0)
