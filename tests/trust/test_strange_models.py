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


@pytest.mark.parametrize("verb", CHANGE | READ)
def test_weights_that_nobody_loaded_are_named(verb, tmp_path):
    with pytest.raises(ValueError, match=r"reads weights, and .*embeddings.weight is not loaded"):
        (CHANGE | READ)[verb](tiny_model("bert").to("meta"), tmp_path)


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
