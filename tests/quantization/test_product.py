"""Tables of centroids: k-means by hand, sizes of the equations, and a model that saves, loads and counts them."""

import json

import pytest
import torch
from torch import nn

import hf_compress as hfc
from hf_compress.layers.packed_embedding import PackedEmbedding, TiedEmbedding, TiedHead
from hf_compress.layers.product_embedding import ProductEmbedding
from hf_compress.layers.scheme import WeightScheme
from hf_compress.measuring.counting import num_parameters
from hf_compress.measuring.stored import stored_size
from hf_compress.quantization import product
from hf_compress.quantization.product import kmeans_centroids, product_quantize
from hf_compress.report.layers import embedding_facts
from tests.helpers import tiny_batch, tiny_model

PARTS = dict(bits=4, group_size=16, embedding_bits=2, embedding_parts=8)


def table(rows=40, columns=6):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).double()


def kmeans_by_hand(points, num_centroids):
    drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist()[:num_centroids]
    centroids = [points[i].clone() for i in drawn]
    for _ in range(product.ROUNDS):
        groups = [[] for _ in centroids]
        for point in points:
            distances = [float((point - c).square().sum()) for c in centroids]
            groups[distances.index(min(distances))].append(point)
        centroids = [torch.stack(g).mean(0) if g else c for g, c in zip(groups, centroids, strict=True)]
    return torch.stack(centroids)


def test_centroids_are_those_of_lloyds_rounds(monkeypatch):
    monkeypatch.setattr(product, "ROWS_AT_ONCE", 7)
    points = table(columns=3)
    points[30:] = points[0]  # alike, so that some centroids have no point
    found = kmeans_centroids(points, 8)
    torch.testing.assert_close(found, kmeans_by_hand(points, 8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts, stages", [(3, 1), (1, 3), (2, 2)], ids=["product", "residual", "both"])
def test_parts_and_stages_are_those_of_the_equations(parts, stages):
    W, bits = table(), 2
    index, levels = product_quantize(W, bits, parts=parts, stages=stages, dtype=torch.float64)
    assert index.shape == (40, parts, stages) and levels.shape == (parts, stages, 4, 6 // parts)
    for s in range(parts):
        rest = W[:, s * 6 // parts : (s + 1) * 6 // parts]
        for t in range(stages):
            centroids = kmeans_by_hand(rest, 4)
            torch.testing.assert_close(levels[s, t], centroids, rtol=1e-6, atol=1e-6)
            for v in range(40):
                distances = [float((rest[v] - c).square().sum()) for c in centroids]
                assert index[v, s, t] == distances.index(min(distances))
            rest = rest - centroids[index[:, s, t]]
        if t:
            assert rest.square().sum() < W[:, s * 6 // parts : (s + 1) * 6 // parts].square().sum()


@pytest.mark.parametrize("parts, stages", [(4, 1), (1, 3)])
def test_a_table_takes_the_bits_of_equations_50_and_51(parts, stages):
    m, n, bits = 1000, 16, 8
    scheme = WeightScheme(bits, num_levels=256, scale_dtype="float32", parts=parts, stages=stages)
    stored = 32 * 256 * n * stages + bits * m * parts * stages  # 32 k n + log2(k) m s, each stage its own
    assert scheme.bits_per_weight(m, n) == pytest.approx(stored / (m * n))
    layer = ProductEmbedding(m, n, scheme)
    words = 32 * layer.qweight.numel() + 32 * layer.levels.numel()
    assert words == stored if parts * stages * bits % 32 == 0 else words > stored


def test_rows_that_are_looked_up_are_those_of_the_table():
    W = table().float()
    index, levels = product_quantize(W, 3, parts=2, stages=2, dtype=torch.float16)
    plain = nn.Embedding(40, 6, padding_idx=0, _weight=W)
    layer = ProductEmbedding.like(plain, WeightScheme(3, num_levels=8, parts=2, stages=2)).fill(index, levels)
    expected = torch.zeros(40, 6)
    for s in range(2):
        for t in range(2):
            expected[:, 3 * s : 3 * s + 3] += levels[s, t][index[:, s, t]]
    assert torch.equal(layer.dequantize(torch.float32), expected)
    ids = torch.tensor([[3, 3, 39], [0, 7, 1]])
    assert torch.equal(layer(ids), expected[ids])
    head, x = TiedHead(layer, None), torch.randn(2, 6)
    torch.testing.assert_close(head(x), x @ expected.T)
    half = layer.to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16 and half.levels.dtype == torch.float16 and half.padding_idx == 0
    assert type(half.unpacked()) is nn.Embedding


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gemma3_text"])
def test_a_model_saves_loads_counts_and_dequantizes(family, tmp_path):
    model = hfc.quantize(tiny_model(family), **PARTS)
    found = [m for m in model.modules() if isinstance(m, ProductEmbedding)]
    assert found and all(m.scheme.parts == 8 for m in found)
    if family == "bert":  # two kinds of token are too few for four centroids
        assert type(model.bert.embeddings.token_type_embeddings) is PackedEmbedding
    else:
        assert any(isinstance(m, (TiedHead, TiedEmbedding)) for m in model.modules())
    batch = tiny_batch(model)
    logits = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    opened = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(opened(**batch).logits, logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    for format in ("gptq", "compressed-tensors", "gemma"):
        with pytest.raises(ValueError, match="[Ee]xport as 'plain'"):
            hfc.export(opened, tmp_path / format, format=format)
    opened.dequantize()
    assert not any(isinstance(m, PackedEmbedding) for m in opened.modules())
    torch.testing.assert_close(opened(**batch).logits, logits, rtol=1e-4, atol=1e-5)


def test_measured_bits_count_indices_and_centroids():
    packed = hfc.quantize(tiny_model("bert"), **PARTS)
    layer = packed.bert.embeddings.word_embeddings  # (64, 32) in 8 parts of 4 centroids
    assert 8 * layer.qweight.nbytes == 64 * 32 and 8 * layer.levels.nbytes == 4 * 32 * 16
    assert embedding_facts(packed) == {"tokens": 64, "embedding_bits": 2 * 8 / 32}
    assert num_parameters(packed) == num_parameters(tiny_model("bert"))
    state = packed.state_dict().values()
    assert stored_size(packed)[1] == sum(tensor.nbytes for tensor in state)


@pytest.mark.parametrize("options, message", [
    (dict(embedding_parts=7), "word_embeddings: parts must divide the columns of a table: got parts=7 and 32"),
    (dict(embedding_parts=0), "parts must be a positive whole number"),
    (dict(embedding_stages=17), "stages one up to 16"),
    (dict(embedding_parts=None, embedding_stages=2), "comes with embedding_parts"),
    (dict(embedding_bits=None), "is for tables"),
    (dict(embedding_bits=8), r"of more than 2 \* 2\^bits rows"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_packed(options, message):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        hfc.quantize(model, **{**PARTS, **options})
    assert not any(hasattr(module, "scheme") for module in model.modules())


BROKEN = {
    "other-parts": ({"parts": 4}, r"word_embeddings.levels has the shape \[4, 1, 4, 8\]"),
    "no-divisor": ({"parts": 7}, "record of .*word_embeddings is damaged: parts must divide"),
    "more-than-columns": ({"parts": 10**9}, "is damaged: parts must divide"),
    "negative": ({"parts": -8}, "parts must be a positive"),
    "true": ({"parts": True}, "parts must be a positive"),
    "many-stages": ({"stages": 10**9}, "stages one up to 16"),
    "stages-alone": ({"parts": None, "stages": 2}, "stages come with parts"),
    "fewer-levels": ({"num_levels": 3}, "Parts of 2 bits have 4 centroids"),
    "other-bits": ({"bits": 4, "num_levels": 16}, "has the shape"),
    "grouped": ({"group_size": 16}, "and no groups"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_record_that_does_not_fit_is_refused(change, message, tmp_path):
    model = hfc.quantize(tiny_model("bert", num_hidden_layers=1), **PARTS)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (entry,) = [e for n, e in config["quantization_config"]["bits"].items() if n.endswith("word_embeddings")]
    entry.update(change)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_record_of_parts_for_a_linear_map_and_centroids_of_nan_are_refused(tmp_path):
    model = hfc.quantize(tiny_model("bert", num_hidden_layers=1), **PARTS)
    model.bert.embeddings.word_embeddings.levels[0, 0, 0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="word_embeddings.levels holds NaN"):
        type(model).from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    bits = config["quantization_config"]["bits"]
    name = next(n for n in bits if n.endswith("query"))
    bits[name] = next(e for n, e in bits.items() if n.endswith("word_embeddings"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="packs .*query, a Linear: it is damaged"):
        type(model).from_pretrained(tmp_path)
