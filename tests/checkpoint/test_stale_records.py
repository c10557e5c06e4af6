"""`from_config` with the config of a compressed model builds an ordinary one; what it saves loads again as such."""

import logging

import pytest
import torch
from helpers import TASKS, tiny_model
from silence import logits
from torch import nn

import hf_compress as hfc
from hf_compress.checkpoint.bits import packed_modules
from hf_compress.pruning.embeddings import factorise_embeddings
from hf_compress.surgery import prune_heads, prune_layers, prune_neurons

COMPRESSED = {
    "bits": lambda: hfc.quantize(tiny_model("bert"), 4, embedding_bits=8),
    "codebooks": lambda: hfc.quantize(tiny_model("bert"), 2, grid="ternary", group_size=-1),
    "bits and structure": lambda: hfc.quantize(prune_heads(tiny_model("bert"), {0: [1], 2: [0, 3]}), 8),
    "structure": lambda: prune_neurons(prune_heads(tiny_model("bert"), {1: [0, 1, 2, 3]}), {3: [1, 2]}),
    "ranks": lambda: factorise_embeddings(tiny_model("bert"), 4),
    "tied ranks": lambda: factorise_embeddings(tiny_model("gpt2"), 4),
    "bits and tied ranks": lambda: hfc.quantize(factorise_embeddings(tiny_model("bart"), 4), 4, embedding_bits=None),
    "other layers": lambda: prune_layers(tiny_model("modernbert"), [1, 2, 3]),
    "a decoder": lambda: hfc.quantize(tiny_model("llama"), 4, embedding_bits=4),
}


def from_config(name, tmp_path):
    """A new model of the config that the compressed one saved."""
    COMPRESSED[name]().save_pretrained(tmp_path / "compressed")
    tasks = {"a decoder": "clm", "tied ranks": "clm", "bits and tied ranks": "seq2seq"}
    kind = TASKS[tasks.get(name, "classification")]
    config = kind.from_pretrained(tmp_path / "compressed").config
    assert hasattr(config, "quantization_config")
    torch.manual_seed(1)
    return kind, kind.from_config(config).eval()


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_from_config_builds_is_trained_saved_and_loaded(name, tmp_path, caplog):
    kind, model = from_config(name, tmp_path)
    model.save_pretrained(tmp_path / "new")
    with caplog.at_level(logging.WARNING):
        loaded = kind.from_pretrained(tmp_path / "new")
    assert "the files hold ordinary ones" in caplog.text
    assert torch.equal(logits(loaded), logits(model))
    assert not any(packed_modules(loaded)) and not hasattr(loaded.config, "quantization_config")
    assert not loaded.is_quantized
    loaded.save_pretrained(tmp_path / "again")
    caplog.clear()
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again")), logits(model)) and not caplog.text


@pytest.mark.parametrize("name", ["bits and structure", "structure"])
def test_it_can_be_quantized_at_once(name, tmp_path):
    kind, model = from_config(name, tmp_path)
    hfc.quantize(model, 4)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "packed")), logits(model))


def test_a_record_that_is_half_true_is_still_refused(tmp_path):
    kind, model = from_config("bits and structure", tmp_path)
    model.bert.encoder.layer[3].output.dense.weight = nn.Parameter(torch.zeros(32, 40))
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="structure|damaged|different models"):
        kind.from_pretrained(tmp_path / "new")
