"""Without hf_compress, what it changed does not load: nothing computes something else and says nothing."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_model
from torch import nn

import hf_compress as hfc

SCRIPT = """
import sys, traceback
from transformers import AutoModel

assert "hf_compress" not in sys.modules
for folder in sys.argv[1:]:
    try:
        AutoModel.from_pretrained(folder)
        print("it loaded", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    print("END OF CASE", file=sys.stderr)
"""


def blocks():
    model = tiny_model("bert")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight[:16])
    return hfc.to_block_sparse(model, 16)


GPT2 = {"scale_attn_by_inverse_layer_idx": True}
CASES = {
    "heads and neurons": lambda: hfc.prune_neurons(
        hfc.prune_heads(tiny_model("bert"), {0: [1], 1: range(4)}), {3: [0]}
    ),
    # all their tensors fit a model of the same depth that computes something else
    "layers of two kinds": lambda: hfc.prune_layers(tiny_model("modernbert"), [1, 3]),
    "layers that are scaled": lambda: hfc.prune_layers(tiny_model("gpt2", **GPT2), [1, 3]),
    # the other tensors all fit: only the sentinel keeps Transformers from making up a table
    "factorised table": lambda: hfc.factorise_embeddings(tiny_model("bert"), 8),
    "packed": lambda: hfc.quantize(tiny_model("bert"), 8, group_size=16),
    "blocks": blocks,
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process that does not know hf_compress says to each: one for all, since starting it takes longest."""
    folders = {name: tmp_path_factory.mktemp("case") for name in CASES}
    for name, folder in folders.items():
        with torch.no_grad():
            CASES[name]().save_pretrained(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return dict(zip(CASES, done.stderr.split("END OF CASE"), strict=False))


@pytest.mark.parametrize("name", CASES)
def test_it_does_not_load_and_hf_compress_is_named(name, said):
    assert "it loaded" not in said[name] and "hf_compress" in said[name]
    assert name != "factorised table" or "word_embeddings.weight" in said[name]
