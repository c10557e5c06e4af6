"""Nothing can be written into a packed, block-sparse or factorised weight: a change would be lost, so it is refused."""

import pytest
import torch
from distillation.data import rows
from helpers import tiny_batch, tiny_model
from pruning.test_callbacks import OurTrainer, arguments
from silence import logits
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

import hf_compress as hfc
from hf_compress.model.anatomy import anatomy


def packed(family="bert"):
    return hfc.quantize(tiny_model(family), bits=8, group_size=-1)


def block_sparse():
    model = tiny_model("bert")
    anatomy(model).layers[0].feed_forward.output.weight.data[:16] = 0
    return hfc.to_block_sparse(model, 16)


def factorised():
    return hfc.factorise_embeddings(tiny_model("bert"), 4)


WEIGHTS = {
    "linear": lambda: packed().bert.encoder.layer[0].output.dense,
    "conv1d": lambda: packed("gpt2").transformer.h[0].attn.c_attn,
    "embedding": lambda: hfc.quantize(tiny_model("bert"), bits=8, embedding_bits=8).bert.embeddings.word_embeddings,
    "tied-head": lambda: hfc.quantize(tiny_model("gpt2"), bits=8, embedding_bits=8).lm_head,
    "codebook": lambda: hfc.quantize(tiny_model("bert"), bits=4, grid="kmeans").bert.encoder.layer[0].output.dense,
    "block-sparse": lambda: block_sparse().bert.encoder.layer[0].output.dense,
    "low-rank": lambda: factorised().bert.embeddings.word_embeddings,
}
WRITES = {
    "in place": lambda w: w.mul_(2),
    "a view": lambda w: w.detach().T[1:].copy_(torch.ones(1)),
    "an index": lambda w: w.__setitem__(0, 1.0),
    "an operator": lambda w: w.__iadd__(1),
    "out": lambda w: torch.add(w, 1, out=w),
    "init": nn.init.zeros_,
    "a function": lambda w: F.relu(w, inplace=True),
    "parts": lambda w: w.chunk(2)[0].zero_(),
    "data": lambda w: w.data,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_way_leads_into_a_dequantized_copy(kind):
    module = WEIGHTS[kind]()
    before = module.weight.clone()
    for how, write in WRITES.items():
        with pytest.raises(RuntimeError, match="read-only"):
            write(module.weight)
            pytest.fail(f"{how} wrote into a {kind}")
    assert torch.equal(module.weight, before)
    assert type(module.weight * 2) is torch.Tensor  # what is computed of it is an ordinary tensor
    assert torch.zeros_like(before).copy_(module.weight).equal(before)


ADVICE = {"block-sparse": "its stored blocks `values`.*before the model is block-sparse",
          "low-rank": "its factors `table` and `projection`.*before the model is factorised"}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_to_do_instead_can_be_done(kind):
    """`dequantize` brings back what is packed, and knows nothing of blocks and factors."""
    weight, message = WEIGHTS[kind]().weight, ADVICE.get(kind, "model.dequantize")
    for write in (lambda: weight.mul_(2), lambda: weight.T[1:].zero_(), lambda: weight.chunk(2)[0].data):
        with pytest.raises(RuntimeError, match=message):
            write()


@pytest.mark.parametrize("make", [factorised, lambda: hfc.quantize(tiny_model("bert"), 8, embedding_bits=8)],
                         ids=["factorised", "packed"])  # fmt: skip
@pytest.mark.parametrize("size", [60, 70])
def test_a_table_that_is_not_resized_leaves_the_model_as_it_was(make, size, tmp_path):
    model = make()
    expected = logits(model)
    with pytest.raises(RuntimeError, match="read-only"):
        model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    assert model.config.vocab_size == 64 and torch.equal(logits(model), expected)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), expected)


REFUSED = {
    "prune_weights": lambda model: hfc.prune_weights(model, 0.5, method="magnitude"),
    "prune_weights-data": lambda model: hfc.prune_weights(model, 0.5, calibration=[tiny_batch(model)]),
    "prepare_qat": lambda model: hfc.prepare_qat(model, bits=4),
    "prune": lambda model: hfc.prune(model, [], sparsity=0.5),
    "prune_heads": lambda model: hfc.prune_heads(model, {0: [1]}),
    "prune_neurons": lambda model: hfc.prune_neurons(model, {0: [1]}),
    "prune_layers": lambda model: hfc.prune_layers(model, keep=[0]),
    "merge_neurons": lambda model: hfc.merge_neurons(model, {0: 1}),
    "to_block_sparse": lambda model: hfc.to_block_sparse(model),
}


@pytest.mark.parametrize("make", [packed, block_sparse])
@pytest.mark.parametrize("verb", REFUSED)
def test_verbs_that_would_write_into_packed_weights_are_refused(verb, make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="quantized or block-sparse|block-sparse or factorised ones, which are read"):
        REFUSED[verb](model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


CALLBACKS = {
    "heads": hfc.HeadPruning,
    "neurons": hfc.NeuronPruning,
    "weights": hfc.WeightPruning,
    "blocks": lambda: hfc.BlockPruning(block_size=8),
    "layers": hfc.LayerPruning,
    "gates": hfc.HeadGates,
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_refuse_packed_weights_before_the_first_step(name, tmp_path):
    with pytest.raises(ValueError, match="this model is quantized or block-sparse"):
        model = block_sparse()
        trainer = OurTrainer(model, arguments(tmp_path), train_dataset=rows(8), callbacks=[CALLBACKS[name]()])
        trainer.train()
    assert trainer.state.global_step == 0


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny_model("bert")

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def with_lora_inside():
    return with_lora().get_base_model()


def with_lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(target_modules=["query", "dense"]))


@pytest.mark.parametrize("trainer_class", [Trainer, OurTrainer])
@pytest.mark.parametrize("make", [Wrapped, with_lora, with_lora_inside])
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_refuse_what_cannot_be_cut_afterwards(name, make, trainer_class, tmp_path):
    if name == "gates" and trainer_class is Trainer:
        pytest.skip("gates are parameters of our trainers")
    trainer = None
    with pytest.raises(ValueError, match="Pass the model inside it|Merge the adapters first"):
        trainer = trainer_class(make(), arguments(tmp_path), train_dataset=rows(8), callbacks=[CALLBACKS[name]()])
        trainer.train()
    assert trainer is None or trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["HeadPruning", "NeuronPruning", "WeightPruning", "BlockPruning", "HeadGates",
                                  "LayerPruning"])  # fmt: skip
@pytest.mark.parametrize("make", [Wrapped, with_lora])
def test_trainers_refuse_it_when_they_are_made(kind, make, tmp_path):
    config = getattr(hfc, f"{kind}Config")(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=f"{kind} changes a Transformers model and its config"):
        getattr(hfc, f"{kind}Trainer")(make(), config, train_dataset=rows(8))
