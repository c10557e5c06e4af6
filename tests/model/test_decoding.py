"""Compiled decoding gives the tokens of plain `generate`, and compiles once for one length of the cache."""

import torch

import hf_compress as hfc
from hf_compress.engines.routes import SMALLEST
from hf_compress.layers.packed_linear import PackedLinear
from tests.helpers import tiny_model


def test_compiled_decoding_generates_the_same_tokens(tmp_path):
    torch._dynamo.reset()
    model = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    hfc.quantize(model, 4, group_size=32, embedding_bits=8).save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    options = hfc.compiled_decoding()
    graphs = []
    options["compile_config"].backend = lambda graph, inputs: graphs.append(graph) or graph
    for length in (4, 7):
        prompt = torch.randint(5, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
        limits = dict(attention_mask=torch.ones_like(prompt), do_sample=False, min_length=20, max_length=20)
        assert torch.equal(model.generate(prompt, **limits, **options), model.generate(prompt, **limits))
    assert len(graphs) == 1
    nodes = [str(node.target) for node in graphs[0].graph.nodes]
    large = [m for m in model.modules() if isinstance(m, PackedLinear) and m.in_features * m.out_features >= SMALLEST]
    assert sum("int4pack_mm" in node for node in nodes) == len(large) > 0
