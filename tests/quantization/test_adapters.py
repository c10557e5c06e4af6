"""Adapters are never packed, measured or pruned along with the model that they stand on."""

import copy

import peft
import pytest
import torch
from helpers import tiny_batch, tiny_model

import hf_compress as hfc
from hf_compress.checkpoint.bits import packed_modules


def wrapped():
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model("bert"), config)


def put_in():
    model = tiny_model("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    return model


def prompted():
    return peft.get_peft_model(tiny_model("bert"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))


def scaled():
    return peft.get_peft_model(tiny_model("bert"), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))


def data(model):
    return [tiny_batch(tiny_model("bert"), batch=8, length=12) | {"labels": torch.tensor([0, 1] * 4)}]


def first(model, part):
    return next(name for name, _ in model.named_modules() if part in name)


VERBS = {
    "quantize": lambda model: hfc.quantize(model, 4),
    "quantize by name": lambda model: hfc.quantize(
        model, {next(n for n, m in model.named_modules() if "query" in n): 4}
    ),
    "gptq": lambda model: hfc.quantize(model, 4, method="gptq", calibration=data(model)),
    "prepare_qat": lambda model: hfc.prepare_qat(model, 4),
    "sensitivity": lambda model: hfc.hessian_sensitivity(model, data(model), method="fisher"),
    "prune_weights": lambda model: hfc.prune_weights(model, 0.5, calibration=data(model)),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", [wrapped, put_in, prompted, scaled], ids=lambda make: make.__name__)
def test_a_model_with_adapters_is_refused_and_left_as_it_was(make, verb):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="[Mm]erge.*adapters|adapters.*[Mm]erge"):
        VERBS[verb](model)
    assert not any(packed_modules(model))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_both_ways_that_the_message_names_work(tmp_path):
    model = wrapped()
    merged = hfc.quantize(model.merge_and_unload(), 8, symmetric=True)
    assert any(packed_modules(merged))
    wrapped().save_pretrained(tmp_path / "adapter")
    base = hfc.quantize(tiny_model("bert"), 8, symmetric=True)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    batch = tiny_batch(base)
    with torch.no_grad():
        difference = (adapted(**batch).logits - merged(**batch).logits).abs().max()
        assert difference < 0.05 * merged(**batch).logits.abs().max()  # 8 bits of the base against 8 bits of the sum
